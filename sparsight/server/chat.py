"""``POST /v1/chat/completions``."""

import asyncio
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
    ImagePart,
    Logprobs,
    Message,
)
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
    texts = _check(service, body)
    if service.settings.log_prompts:
        request.state.log["prompt"] = list(texts.values())
    recipe = body.chosen_recipe(service.engine.recipe)
    generation = service.accept("chatcmpl", key_of(request))
    answers = _ChatAnswers(service, body, generation)

    async def begin() -> None:
        images = await asyncio.gather(*map(service.images.load, _image_urls(body.messages)))
        ready = await service.prompts.from_messages(_chat(body.messages, iter(images)))
        longest = body.max_tokens or body.max_completion_tokens
        sampling = body.sampling
        if body.logprobs:
            sampling["logprobs"] = body.top_logprobs or 0
        await generation.begin(ready, recipe, longest, sampling)

    return await respond(request, generation, begin(), answers.complete, answers.events() if body.stream else None)


def _check(service: Service, body: ChatRequest) -> dict[str, str]:
    """The texts of a request by the names of their fields.

    Raises:
        APIError: the request exceeds a limit, or its fields do not go together.
    """
    settings = service.settings
    service.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise APIError(400, "max_tokens and max_completion_tokens exclude each other.", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs.", param="top_logprobs")
    requested = body.max_tokens or body.max_completion_tokens
    service.check_sampling(body, requested)
    if len(body.messages) > settings.max_messages:
        raise APIError(400, f"messages must have at most {settings.max_messages} items.", param="messages")
    if len(_image_urls(body.messages)) > settings.max_images:
        raise APIError(400, f"messages must have at most {settings.max_images} images.", param="messages")
    texts = {}
    for number, message in enumerate(body.messages):
        field = f"messages[{number}].content"
        if isinstance(message.content, str):
            texts[field] = message.content
        else:
            parts = enumerate(message.content)
            texts |= {f"{field}[{index}].text": part.text for index, part in parts if not isinstance(part, ImagePart)}
    service.prompts.check_texts(texts)
    return texts


def _image_urls(messages: Iterable[Message]) -> list[str]:
    parts = [part for message in messages if not isinstance(message.content, str) for part in message.content]
    return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


def _chat(messages: Iterable[Message], images: Any) -> list[dict[str, Any]]:
    """Messages in the processor's chat format, with the images in their order."""
    chat = []
    for message in messages:
        content = [message.content] if isinstance(message.content, str) else message.content
        parts: list[dict[str, Any]] = []
        for part in content:
            if isinstance(part, ImagePart):
                parts.append({"type": "image", "image": next(images)})
            else:
                parts.append({"type": "text", "text": part if isinstance(part, str) else part.text})
        chat.append({"role": message.role, "content": parts})
    return chat


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
