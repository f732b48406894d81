"""Limits on what a client sends, checked before a request is parsed, as ASGI middleware."""

import ipaddress

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsight.server.errors import APIError

MAX_ITEMS = 2**18
"""Commas and opening brackets in a body. The parser of JSON takes some 60 ms for them, and stops all clients."""


class HeaderLimit:
    """Limits the number of headers, and their bytes together with the path and the query."""

    def __init__(self, app: ASGIApp, max_headers: int, max_bytes: int) -> None:
        self.app, self.max_headers, self.max_bytes = app, max_headers, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            size = sum(len(name) + len(value) for name, value in headers)
            size += len(scope["raw_path"]) + len(scope["query_string"])
            if len(headers) > self.max_headers or size > self.max_bytes:
                message = f"A request may have at most {self.max_headers} headers of {self.max_bytes:,} bytes together."
                await _close(APIError(431, message, code="headers_too_large"), scope, receive, send)
                return
        await self.app(scope, receive, send)


class LocalHost:
    """Lets requests pass that name this machine in their ``Host`` header.

    A server without keys that listens on a loopback address is open to every page in a browser on the same machine, if
    its domain is made to resolve to that address. The browser still sends the domain.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_local(Headers(scope=scope).get("host", "")):
            message = "Without API keys, this server answers requests to localhost and IP addresses only."
            await _close(APIError(403, message, code="unknown_host"), scope, receive, send)
            return
        await self.app(scope, receive, send)


class BodyLimit:
    """Reads request bodies, and hands them on complete.

    Args:
        app: what answers.
        max_bytes: largest body. What is declared larger is not read.
        seconds: time for a body to arrive.
        max_total: bytes of all bodies that are being read at the same time.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, max_total: int) -> None:
        self.app, self.max_bytes, self.seconds, self.max_total = app, max_bytes, seconds, max_total
        self._total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            with anyio.fail_after(self.seconds):
                message: Message | None = await self._read(Headers(scope=scope), receive)
        except TimeoutError:
            error = APIError(408, f"A request's body must arrive within {self.seconds:g} seconds.", code="timeout")
            await _close(error, scope, receive, send)
            return
        except APIError as error:
            await _close(error, scope, receive, send)
            return

        async def replay() -> Message:
            nonlocal message
            given, message = message, None
            return given or await receive()

        await self.app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> Message:
        too_large = APIError(
            413, f"A request's body may have at most {self.max_bytes:,} bytes.", code="request_too_large"
        )
        # A little too much is read to its end and dropped, since a client that is still sending does not read the answer.
        patience = self.max_bytes if "expect" in headers else 2 * self.max_bytes
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > patience:
            raise too_large
        body, size, more = bytearray(), 0, True
        try:
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)
                if size > patience:
                    raise too_large
                if size <= self.max_bytes:
                    body += chunk
                    self._total += len(chunk)
                if self._total > self.max_total:
                    message = "Too many requests are being read; try again later."
                    raise APIError(503, message, kind="server_error", code="overloaded", retry_after=1)
        finally:
            self._total -= len(body)
        if size > self.max_bytes:
            raise too_large
        if sum(body.count(char) for char in (b",", b"[", b"{")) > MAX_ITEMS:
            raise APIError(413, f"A request's body may have at most {MAX_ITEMS:,} commas and brackets.")
        return {"type": "http.request", "body": bytes(body), "more_body": False}


async def _close(error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error and end the connection, whose client may be about to send more."""
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


def _is_local(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    try:
        return name.lower() == "localhost" or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False
