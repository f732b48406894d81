"""Requests and responses of ``/v1/responses``."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sparsight.server.schema import Body, CacheUsage, Count, ImageBody, Method, check_parts

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    """A piece of text."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"prompt_cache_breakpoint": ()}
    type: Literal["input_text"]
    text: str


class InputImage(ImageBody):
    """An image among texts; ``detail`` changes nothing."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"file_id": (), "prompt_cache_breakpoint": ()}
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None

    @property
    def link(self) -> str:
        """The URL."""
        return self.image_url


class AnswerText(Body):
    """The text of an earlier answer."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],), "logprobs": ([],)}
    type: Literal["output_text"]
    text: str


class UserItem(Body):
    """A message with text and images."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"type": ("message",), "status": ("completed",), "phase": ()}
    role: Literal["user"]
    content: (
        str | Annotated[list[Annotated[InputText | InputImage, Field(discriminator="type")]], Field(fail_fast=True)]
    )


class SystemItem(Body):
    """What the model is to keep to."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = UserItem.NEUTRAL
    role: Literal["system", "developer"]
    content: str | Annotated[list[InputText], Field(fail_fast=True)]


class AnswerItem(Body):
    """An earlier answer, as the ``output`` of its response has it."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"type": ("message",), "phase": ()}
    role: Literal["assistant"]
    content: str | Annotated[list[AnswerText], Field(fail_fast=True)]
    id: str | None = None
    status: Status | None = None


Item = Annotated[SystemItem | UserItem | AnswerItem, Field(discriminator="role")]


class ResponsesRequest(Body):
    """A text or a conversation that the model continues."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "metadata": ({},),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
        "reasoning": ({}, {"effort": "none"}),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    model: str
    input: Annotated[
        Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1, fail_fast=True)],
        BeforeValidator(check_parts),
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    user: str | None = None
    sparsight: Method | None = None


class OutputText(BaseModel):
    """The text of the answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class InputDetails(BaseModel):
    """Tokens of the prompt that a cache of prompts had."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Tokens of the answer that are not its text."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens of a request, and what the KV cache held of its prompt."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int
    sparsight: CacheUsage | None


class Incomplete(BaseModel):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """The response to a request; nothing of it is stored."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int
    temperature: float
    top_p: float
    error: None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    tool_choice: Literal["none"] = "none"
    tools: list[str] = []


class Event(BaseModel):
    """An event of a stream."""

    model_config = ConfigDict(extra="allow")
    type: str
    sequence_number: int
