"""``POST /v1/responses``; nothing is stored."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from sparsight.server.conversation import check_messages, check_texts, load
from sparsight.server.errors import APIError
from sparsight.server.generation import Generation
from sparsight.server.kept import key_of
from sparsight.server.responses_schema import (
    Event,
    Incomplete,
    Item,
    OutputMessage,
    OutputText,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    Status,
    SystemItem,
    UserItem,
)
from sparsight.server.schema import ERRORS, STREAM, usage_of
from sparsight.server.service import Service
from sparsight.server.streaming import respond

router = APIRouter()


@router.post("/v1/responses", response_model=ResponseObject, responses=STREAM | ERRORS)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """Answer a text or a conversation with images, completely or as a stream."""
    service: Service = request.app.state.service
    messages = _check(request, body)
    default = service.engine.recipe
    recipe = default if body.sparsight is None else body.sparsight.recipe(default)
    generation = service.accept("resp", key_of(request))
    answer = _Answer(service, body, generation)

    async def begin() -> None:
        given = {"temperature": body.temperature, "top_p": body.top_p}
        sampling = {name: value for name, value in given.items() if value is not None}
        await generation.begin(await load(service, messages), recipe, body.max_output_tokens, sampling)

    return await respond(request, generation, begin(), answer.complete, answer.events() if body.stream else None)


def _check(request: Request, body: ResponsesRequest) -> list[Item]:
    """The messages of a request. Raises APIError if it exceeds a limit."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    longest = service.settings.max_new_tokens
    if body.max_output_tokens is not None and body.max_output_tokens > longest:
        raise APIError(400, f"max_output_tokens must be at most {longest}.", param="max_output_tokens")
    if isinstance(body.input, str):
        messages: list[Item] = [UserItem(role="user", content=body.input)]
        texts = {"input": body.input}
    else:
        messages, texts = body.input, check_messages(service, body.input, "input")
    if body.instructions is not None:
        messages = [SystemItem(role="system", content=body.instructions), *messages]
        texts["instructions"] = body.instructions
    check_texts(request, texts)
    return messages


class _Answer:
    """The answer to a request, as a response and as events."""

    def __init__(self, service: Service, body: ResponsesRequest, generation: Generation) -> None:
        self._name, self._body, self._generation = service.name, body, generation
        self._message_id = f"msg-{generation.id.partition('-')[2]}"

    def complete(self) -> ResponseObject:
        """The response."""
        generation = self._generation
        (answer,) = generation.completions
        status: Status = "incomplete" if answer.finish_reason == "length" else "completed"
        usage = usage_of(generation.prompt_tokens, generation.new_tokens, answer)
        own = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            sparsight=usage.sparsight,
        )
        return self._response(status, [self._message(status, answer.text)], own)

    async def events(self) -> AsyncIterator[Event]:
        """The events of a stream, numbered.

        Raises:
            APIError: the request failed.
        """
        number = 0
        async for type, fields in self._numberless():
            yield Event(type=f"response.{type}", sequence_number=number, **fields)
            number += 1

    async def _numberless(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        begun = {"response": self._response("in_progress", [], None).model_dump()}
        item: dict[str, Any] = {"output_index": 0}
        part = item | {"item_id": self._message_id, "content_index": 0}
        yield "created", begun
        yield "in_progress", begun
        yield "output_item.added", item | {"item": self._message("in_progress").model_dump()}
        yield "content_part.added", part | {"part": OutputText(text="").model_dump()}
        while pieces := await self._generation.pieces():
            for piece in pieces:
                if piece.text:
                    yield "output_text.delta", part | {"delta": piece.text, "logprobs": []}
        response = self.complete()
        (message,) = response.output
        (text,) = message.content
        yield "output_text.done", part | {"text": text.text, "logprobs": []}
        yield "content_part.done", part | {"part": text.model_dump()}
        yield "output_item.done", item | {"item": message.model_dump()}
        yield response.status, {"response": response.model_dump()}

    def _message(self, status: Status, *texts: str) -> OutputMessage:
        return OutputMessage(id=self._message_id, status=status, content=[OutputText(text=text) for text in texts])

    def _response(self, status: Status, output: list[OutputMessage], usage: ResponseUsage | None) -> ResponseObject:
        generation = self._generation
        return ResponseObject(
            id=generation.id,
            created_at=generation.created,
            status=status,
            model=self._name,
            output=output,
            usage=usage,
            incomplete_details=Incomplete() if status == "incomplete" else None,
            instructions=self._body.instructions,
            max_output_tokens=generation.params.max_new_tokens,
            temperature=generation.params.temperature,
            top_p=generation.params.top_p,
        )
