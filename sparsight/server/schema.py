"""Request fields and response parts that endpoints share, as OpenAI's API has them."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sparsight.compression.recipe import Recipe
from sparsight.engine.request import Completion
from sparsight.methods import recipe as recipe_by_name
from sparsight.server.errors import APIError
from sparsight.server.validation import OWN

MAX_STOP, MAX_STOP_LENGTH, MAX_BIASES, MAX_TOP_LOGPROBS = 4, 256, 1024, 20

MAX_FIELDS = 64
"""Fields of an object. Errors for very many of them would take seconds, in which no other client is answered."""

MAX_PARTS = 2048
"""Messages of a request and parts of their contents: to validate more of them would stop all other clients."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Body(BaseModel):
    """Part of a request: unknown fields are errors, and so are values of another type.

    Fields of ``NEUTRAL`` are not supported, but a client may send them as null or with a value that changes nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise PydanticCustomError(OWN, "has too many fields")
        return {
            name: value
            for name, value in data.items()
            if name not in cls.NEUTRAL or not (value is None or value in cls.NEUTRAL[name])
        }


class ImageBody(Body, ABC):
    """The part of a message that is an image."""

    @property
    @abstractmethod
    def link(self) -> str:
        """The image's URL."""


def check_parts(messages: Any) -> Any:
    """Messages that have not been validated, unless there are too many of them or of their parts."""
    if isinstance(messages, list):
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        if len(messages) + sum(len(each) for each in contents if isinstance(each, list)) > MAX_PARTS:
            raise PydanticCustomError(OWN, f"must have at most {MAX_PARTS:,} messages and parts")
    return messages


class Method(Body):
    """How the prompt's KV cache is compressed; what is left out is the server's default."""

    method: str | None = None
    budget: Annotated[float, Field(gt=0, le=1)] | None = None

    def recipe(self, default: Recipe) -> Recipe:
        """The recipe.

        Raises:
            APIError: there is no such method, or it takes no budget.
        """
        try:
            if self.method is not None:
                return recipe_by_name(self.method, **({} if self.budget is None else {"budget": self.budget}))
        except ValueError as error:
            message = "sparsight.method is not the name of a method, or the method takes no budget."
            raise APIError(400, message, param="sparsight.method") from error
        return default if self.budget is None else dataclasses.replace(default, budget=self.budget)


class StreamOptions(Body):
    """What a stream has besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """The fields of chat completions and completions that decide how answers are sampled and returned."""

    model: str
    max_tokens: Count | None = None
    n: Count | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool | None = None
    sparsight: Method | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _token_ids(cls, bias: Any) -> Any:
        if isinstance(bias, dict):
            if len(bias) > MAX_BIASES:
                raise PydanticCustomError(OWN, f"must have at most {MAX_BIASES} items")
            if not all(token.isdecimal() and token.isascii() and len(token) < 10 for token in bias):
                raise PydanticCustomError(OWN, "must map token ids to numbers")
        return bias

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of :class:`~sparsight.SamplingParams` that the request sets."""
        names = ("n", "stop", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty", "ignore_eos")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return given

    def chosen_recipe(self, default: Recipe) -> Recipe:
        """How the prompt is compressed."""
        return default if self.sparsight is None else self.sparsight.recipe(default)


class CacheUsage(BaseModel):
    """What the KV cache held of the prompt, for each answer.

    ``kept`` is the mean number of entries over layers and KV heads; ``kv_bytes`` has spare capacity included, and
    ``full_kv_bytes`` is the size of the full cache.
    """

    method: str
    budget: float
    kv_bytes: int
    full_kv_bytes: int
    kept: float


class PromptDetails(BaseModel):
    """Tokens of the prompt that were not computed, since an earlier prompt had them."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request; ``sparsight`` is there once the answers are complete."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    sparsight: CacheUsage | None = None


def usage_of(prompt_tokens: int, new_tokens: int, completion: Completion | None = None) -> Usage:
    """Usage of a request, with the cache's report of one of its answers."""
    cache = details = None
    if completion is not None:
        report = completion.report
        kept = sum(report.kept_per_layer()) / max(len(report.kept), 1)
        sizes = {"kv_bytes": report.bytes_held, "full_kv_bytes": report.full_bytes}
        cache = CacheUsage(method=report.method, budget=report.budget, kept=kept, **sizes)
        details = PromptDetails(cached_tokens=completion.reused_tokens)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=new_tokens,
        total_tokens=prompt_tokens + new_tokens,
        prompt_tokens_details=details,
        sparsight=cache,
    )


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorDetails


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}
"""Responses that every endpoint may have."""

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}
"""The other response of endpoints that can stream."""
