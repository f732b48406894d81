"""Errors as OpenAI's clients understand them."""

import json
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

RETRY_SECONDS = 1
"""After which a client that was rejected may try again."""


class APIError(Exception):
    """What a client gets instead of an answer.

    Args:
        status: the HTTP status.
        message: one sentence of our own; never the text of another library.
        kind: OpenAI's ``type``, such as ``invalid_request_error``.
        param: the field that is wrong.
        code: a word for programs.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The response's JSON; also what an event stream ends with."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def json(self) -> str:
        """The response's JSON as text."""
        return json.dumps(self.body(), ensure_ascii=False)

    def response(self) -> JSONResponse:
        """The response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return _ErrorResponse(self.code or self.kind, self.body(), self.status, headers)


class _ErrorResponse(JSONResponse):
    """Leaves the error's code in the request's entry of the access log."""

    def __init__(self, code: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        scope.setdefault("state", {}).setdefault("log", {})["error"] = self._code
        await super().__call__(scope, receive, send)


def unexpected() -> APIError:
    """What a client is told of a failure of our own."""
    return APIError(500, "The server failed on the request.", kind="server_error")


def stopping() -> APIError:
    """The answer of a server that stops."""
    message = "The server is shutting down."
    return APIError(503, message, kind="server_error", code="shutting_down", retry_after=RETRY_SECONDS)
