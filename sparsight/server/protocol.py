"""uvicorn's HTTP protocol with limits for clients that hold connections and send or read nothing."""

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sparsight.server.errors import RETRY_SECONDS, APIError


def limited_protocol(header_seconds: float, send_seconds: float, max_connections: int) -> type[H11Protocol]:
    """A protocol for :class:`uvicorn.Config`.

    Args:
        header_seconds: time for the line and the headers of a request to arrive.
        send_seconds: time for which a client may stop to read its response.
        max_connections: open connections; a further one gets 503 at once, before anything of it is read.
    """

    class LimitedProtocol(H11Protocol):
        header_timer: asyncio.TimerHandle | None = None
        send_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                message = f"The server is busy: {max_connections} connections are open."
                self._end(APIError(503, message, kind="server_error", code="overloaded", retry_after=RETRY_SECONDS))
                return
            self.header_timer = self.loop.call_later(header_seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel_header_timer()
            elif self.header_timer is None:
                # The beginning of another request, or the rest of one whose answer has been sent.
                self.header_timer = self.loop.call_later(header_seconds, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_header_timer()
            self._cancel_send_timer()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.send_timer = self.loop.call_later(send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._cancel_send_timer()
            super().resume_writing()

        def _cancel_header_timer(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()
                self.header_timer = None

        def _cancel_send_timer(self) -> None:
            if self.send_timer is not None:
                self.send_timer.cancel()
                self.send_timer = None

        def send_400_response(self, msg: str) -> None:
            self._end(APIError(400, "The request is not valid HTTP, or its headers are too large."))

        def _end(self, error: APIError) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                response = error.response()
                headers = [*response.raw_headers, (b"connection", b"close")]
                reason = HTTPStatus(error.status).phrase.encode()
                head = h11.Response(status_code=error.status, headers=headers, reason=reason)
                for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return LimitedProtocol
