"""Limits on what clients send, checked before a request is parsed, as ASGI middleware."""

from collections.abc import Callable
from ipaddress import ip_address

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsight.server.errors import APIError

MAX_ITEMS = 2**18
"""Commas and opening brackets in a body: parsing JSON holds up all clients, some 60 ms for so many values."""


class Guard:
    """Middleware that checks HTTP requests, and answers those that it refuses."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        if scope["type"] == "http":
            try:
                receive = await self.check(scope, receive)
            except APIError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """What the application receives the request's body from.

        Raises:
            APIError: the request is refused.
        """
        raise NotImplementedError


class HeaderLimit(Guard):
    """Limits the number of headers, and their bytes together with those of the path and the query."""

    def __init__(self, app: ASGIApp, max_headers: int, max_bytes: int) -> None:
        super().__init__(app)
        self.max_headers, self.max_bytes = max_headers, max_bytes

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """Count."""
        headers = scope["headers"]
        size = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self.max_headers or size > self.max_bytes:
            message = f"A request may have at most {self.max_headers} headers and {self.max_bytes:,} bytes of them."
            raise APIError(431, message, code="headers_too_large")
        return receive


class LocalHost(Guard):
    """Refuses requests whose ``Host`` is a domain.

    A web page in a browser on this machine could otherwise use a server that has no keys and listens on a loopback
    address: its domain only has to resolve to that address. The browser still sends the domain.
    """

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """Compare the host."""
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        try:
            if name.lower() != "localhost":
                ip_address(name.strip("[]"))
        except ValueError as error:
            message = "Without API keys, this server answers to localhost and IP addresses only, not to domains."
            raise APIError(403, message, code="unknown_host") from error
        return receive


class QueueLimit(Guard):
    """Refuses requests to generate, before their bodies are read, while the server cannot take them.

    Args:
        app: the application.
        check_queue: raises the error.
    """

    def __init__(self, app: ASGIApp, check_queue: Callable[[], None]) -> None:
        super().__init__(app)
        self.check_queue = check_queue

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """Check."""
        if scope["method"] == "POST":
            self.check_queue()
        return receive


class BodyLimit(Guard):
    """Reads bodies completely before the application begins.

    Args:
        app: the application.
        max_bytes: largest body.
        max_total: bytes of all bodies that are being read at the same time.
        seconds: time for a body to arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_total: int, seconds: float) -> None:
        super().__init__(app)
        self.max_bytes, self.max_total, self.seconds = max_bytes, max_total, seconds
        self._total = 0

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body."""
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_bytes:
            raise self._too_large()
        try:
            with anyio.fail_after(self.seconds):
                body: Message | None = await self._read(receive)
        except TimeoutError as error:
            late = f"A request's body must arrive within {self.seconds:g} seconds."
            raise APIError(408, late, code="timeout") from error

        async def complete() -> Message:
            nonlocal body
            given, body = body, None
            return given or await receive()

        return complete

    async def _read(self, receive: Receive) -> Message:
        """The body in one message, or the client's disconnection."""
        body, items, more = bytearray(), 0, True
        try:
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                chunk, more = message.get("body", b""), message.get("more_body", False)
                body += chunk
                self._total += len(chunk)
                if len(body) > self.max_bytes:
                    raise self._too_large()
                if self._total > self.max_total:
                    busy = "The server is busy: too many requests are being read."
                    raise APIError(503, busy, kind="server_error", code="overloaded", retry_after=1)
                items += chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")
                if items > MAX_ITEMS:
                    raise APIError(413, f"A request's body may have at most {MAX_ITEMS:,} commas and opening brackets.")
        finally:
            self._total -= len(body)
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    def _too_large(self) -> APIError:
        return APIError(413, f"A request's body may have at most {self.max_bytes:,} bytes.", code="request_too_large")
