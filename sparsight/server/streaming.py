"""Responses that end with their client: server-sent events, and waiting that stops when the client is gone."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from sparsight.server.access_log import CLIENT_CLOSED_REQUEST
from sparsight.server.engine_loop import logger
from sparsight.server.errors import APIError, unexpected
from sparsight.server.generation import Generation

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


class Disconnected(Exception):
    """The client has gone."""


async def respond(
    request: Request,
    generation: Generation,
    beginning: Coroutine[None, None, None],
    complete: Callable[[], BaseModel],
    events: AsyncIterator[BaseModel] | None,
) -> Response:
    """The response to a request, which gives its place back when it has ended or its client has gone.

    Args:
        request: the HTTP request; its body has been read.
        generation: its place.
        beginning: prepares the prompt and begins the generation.
        complete: the body of the response, when the answers are complete.
        events: the body as a stream, in place of ``complete``.

    Raises:
        APIError: the request fails before anything is sent.
    """
    generation.log = request.state.log
    try:
        await _unless_disconnected(request, beginning)
        if events is not None:
            return EventStream(events, generation.close)
        await _unless_disconnected(request, generation.finish())
        response = Response(complete().model_dump_json(), media_type="application/json")
    except Disconnected:
        response = Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        generation.close()
        raise
    generation.close()
    return response


async def _unless_disconnected(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of some work, which is cancelled if the client goes.

    Raises:
        Disconnected: it has gone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Disconnected
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, the last of them ``[DONE]``; an error is an event with its body.

    Args:
        events: the data of each event.
        close: called when the stream has ended, or its client has gone.
    """

    def __init__(self, events: AsyncIterator[BaseModel], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_encoded(events), media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _encoded(events: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    try:
        async for event in events:
            name = getattr(event, "type", None)
            yield f"event: {name}\n" * (name is not None) + f"data: {event.model_dump_json(exclude_unset=True)}\n\n"
    except Exception as error:
        if not isinstance(error, APIError):
            logger.exception("A stream failed.")
            error = unexpected()
        yield f"data: {error.json()}\n\n"
    yield DONE
