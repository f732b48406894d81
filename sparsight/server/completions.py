"""``POST /v1/completions``: text without a chat template."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from sparsight.engine.request import Piece
from sparsight.engine.sampling import Sampled
from sparsight.server.answers import Answers, FinishReason, finish_reason
from sparsight.server.conversation import check_texts
from sparsight.server.errors import APIError
from sparsight.server.generation import Generation
from sparsight.server.kept import key_of
from sparsight.server.logprobs import TextLogprobs, TextLogprobsStream
from sparsight.server.schema import ERRORS, STREAM, SamplingBody, Usage
from sparsight.server.service import Service
from sparsight.server.streaming import respond

router = APIRouter()

DEFAULT_MAX_TOKENS, MAX_LOGPROBS = 16, 5
"""OpenAI's."""

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
SOME = Field(min_length=1, fail_fast=True)


class CompletionRequest(SamplingBody):
    """A text, or the ids of its tokens, that the model continues."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
    prompt: Text | Annotated[list[Text], SOME] | Annotated[list[TokenId], SOME]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionChoice(BaseModel):
    """One of the answers, or what an event has of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(BaseModel):
    """The answers to a prompt, or an event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


@router.post("/v1/completions", response_model=TextCompletion, responses=STREAM | ERRORS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue a text, completely or as a stream."""
    service: Service = request.app.state.service
    prompts, longest = service.prompts, body.max_tokens or min(DEFAULT_MAX_TOKENS, service.settings.max_new_tokens)
    service.check_model(body.model)
    service.check_sampling(body, longest)
    prompt: Any = body.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise APIError(400, "prompt must be one text, or the tokens of one.", param="prompt")
        prompt = prompt[0]
    if isinstance(prompt, str):
        check_texts(request, {"prompt": prompt})
    recipe = body.chosen_recipe(service.engine.recipe)
    generation = service.accept("cmpl", key_of(request))
    answers = _TextAnswers(service, body, generation)

    async def begin() -> None:
        ready = await prompts.from_text(prompt) if isinstance(prompt, str) else prompts.from_tokens(prompt)
        sampling = body.sampling
        if body.logprobs is not None:
            sampling["logprobs"] = body.logprobs
        await generation.begin(ready, recipe, longest, sampling)

    return await respond(request, generation, begin(), answers.complete, answers.events() if body.stream else None)


class _TextAnswers(Answers):
    def __init__(self, service: Service, body: CompletionRequest, generation: Generation) -> None:
        super().__init__(service, body, generation)
        self._logprobs: list[TextLogprobsStream] = []
        if body.logprobs is not None:
            self._logprobs = [TextLogprobsStream(self.tokenizer) for _ in range(body.n or 1)]

    def complete(self) -> TextCompletion:
        choices = [
            _choice(index, answer.text, self._logprobs_of(index, answer.tokens), finish_reason(answer))
            for index, answer in enumerate(self.generation.completions)
        ]
        return self.event(choices, usage=self.usage(complete=True))

    def event(self, choices: list[Any], **usage: Any) -> TextCompletion:
        return TextCompletion(**self.common, object="text_completion", choices=choices, **usage)

    def piece(self, piece: Piece) -> CompletionChoice | None:
        logprobs = self._logprobs_of(piece.answer, [] if piece.token is None else [piece.token])
        if not piece.text and not (logprobs and logprobs.tokens):
            return None
        return _choice(piece.answer, piece.text, logprobs)

    def closing(self, index: int, reason: FinishReason) -> CompletionChoice:
        return _choice(index, "", reason=reason)

    def _logprobs_of(self, index: int, tokens: Iterable[Sampled]) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        return self._logprobs[index].push(each for each in tokens if each.token_id not in self.generation.end_token_ids)


def _choice(
    index: int, text: str, logprobs: TextLogprobs | None = None, reason: FinishReason | None = None
) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
