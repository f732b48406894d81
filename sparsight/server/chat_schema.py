"""Requests and responses of chat completions."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from sparsight.server.answers import FinishReason
from sparsight.server.logprobs import TokenLogprob
from sparsight.server.schema import MAX_TOP_LOGPROBS, Body, ImageBody, SamplingBody, Usage, check_parts


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(Body):
    """An image; ``detail`` changes nothing."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(ImageBody):
    """An image among texts."""

    type: Literal["image_url"]
    image_url: ImageURL

    @property
    def link(self) -> str:
        """The URL."""
        return self.image_url.url


class UserMessage(Body):
    """A message with text and images."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"name": ()}
    role: Literal["user"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(fail_fast=True)]


class SystemMessage(Body):
    """What the model is to keep to."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"name": ()}
    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]


class AssistantMessage(Body):
    """An earlier answer."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "name": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
        "tool_calls": ([],),
    }
    role: Literal["assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class ChatRequest(SamplingBody):
    """A conversation that the model continues."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(check_parts)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class Logprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """What a chunk has of one of the answers."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
