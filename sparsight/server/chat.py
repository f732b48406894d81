"""``POST /v1/chat/completions``."""

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response

from sparsight.engine.request import Piece
from sparsight.engine.sampling import Sampled
from sparsight.server.answers import Answers, FinishReason, finish_reason
from sparsight.server.chat_schema import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    Logprobs,
)
from sparsight.server.conversation import check_messages, check_texts, load
from sparsight.server.errors import APIError
from sparsight.server.generation import Generation
from sparsight.server.kept import key_of
from sparsight.server.logprobs import token_logprob
from sparsight.server.schema import ERRORS, STREAM
from sparsight.server.service import Service
from sparsight.server.streaming import respond

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM | ERRORS)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation with images, completely or as a stream."""
    service: Service = request.app.state.service
    _check(request, body)
    recipe = body.chosen_recipe(service.engine.recipe)
    generation = service.accept("chatcmpl", key_of(request))
    answers = _ChatAnswers(service, body, generation)

    async def begin() -> None:
        ready = await load(service, body.messages)
        longest = body.max_tokens or body.max_completion_tokens
        sampling = body.sampling
        if body.logprobs:
            sampling["logprobs"] = body.top_logprobs or 0
        await generation.begin(ready, recipe, longest, sampling)

    return await respond(request, generation, begin(), answers.complete, answers.events() if body.stream else None)


def _check(request: Request, body: ChatRequest) -> None:
    """Raise APIError if the request exceeds a limit, or its fields do not go together."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise APIError(400, "max_tokens and max_completion_tokens exclude each other.", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs.", param="top_logprobs")
    requested = body.max_tokens or body.max_completion_tokens
    service.check_sampling(body, requested)
    check_texts(request, check_messages(service, body.messages, "messages"))


class _ChatAnswers(Answers):
    """The answers to a conversation."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation) -> None:
        super().__init__(service, body, generation)
        self._has_logprobs = bool(body.logprobs)

    def complete(self) -> ChatCompletion:
        """All answers."""
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(content=answer.text),
                logprobs=self._logprobs(answer.tokens),
                finish_reason=finish_reason(answer),
            )
            for index, answer in enumerate(self.generation.completions)
        ]
        return ChatCompletion(**self.common, choices=choices, usage=self.usage(complete=True))

    def event(self, choices: list[Any], **usage: Any) -> ChatChunk:
        """An event with what is new of some answers."""
        return ChatChunk(**self.common, object="chat.completion.chunk", choices=choices, **usage)

    def opening(self, index: int) -> ChunkChoice:
        """The role."""
        return _chunk(index, Delta(role="assistant", content=""))

    def piece(self, piece: Piece) -> ChunkChoice | None:
        """New text or new log-probabilities."""
        logprobs = self._logprobs([] if piece.token is None else [piece.token])
        if not piece.text and not (logprobs and logprobs.content):
            return None
        return _chunk(piece.answer, Delta(content=piece.text), logprobs)

    def closing(self, index: int, reason: FinishReason) -> ChunkChoice:
        """Why the answer has ended."""
        return _chunk(index, Delta(), reason=reason)

    def _logprobs(self, tokens: Iterable[Sampled]) -> Logprobs | None:
        """Log-probabilities of tokens with a text, if they were requested."""
        if not self._has_logprobs:
            return None
        shown = [token for token in tokens if token.token_id not in self.generation.end_token_ids]
        return Logprobs(content=[token_logprob(self.tokenizer, token) for token in shown])


def _chunk(
    index: int, delta: Delta, logprobs: Logprobs | None = None, reason: FinishReason | None = None
) -> ChunkChoice:
    return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
