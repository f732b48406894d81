"""The access log: one line for each request, without prompts, images or keys."""

import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsight.server.metrics import Metrics
from sparsight.utils.text import printable

LOGGER = logging.getLogger("sparsight.access")

CLIENT_CLOSED_REQUEST = 499
"""The status that logs have for a request whose client has gone; nobody receives it."""


class AccessLog:
    """ASGI middleware that logs every request, and counts those that get an error; the outermost sees them all.

    Gives each request an id, unless ``scope["state"]["request_id"]`` is one. The response has it as the header
    ``x-request-id``. What an endpoint adds to the dict ``scope["state"]["log"]`` is logged with the request.

    Args:
        app: the application.
        metrics: where errors are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_CLOSED_REQUEST
        fields: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state["log"] = fields
        request_id = state.get("request_id") or f"req-{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status, fields["error"] = 500, "server_error"
            raise
        finally:
            if "error" in fields:
                self._metrics.rejected.labels(fields["error"]).inc()
            path = printable(scope["path"])
            request = {"request_id": request_id, "method": scope["method"], "path": path, "status": status}
            seconds = round(time.perf_counter() - started, 4)
            LOGGER.info("request", extra={"fields": request | {"seconds": seconds} | fields})


class LineFormatter(logging.Formatter):
    """Time, level and message, and the fields of a record as ``name=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, to which a traceback may be added."""
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={_value(value)}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the fields of a record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        now = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}))


def configure_logging(json_lines: bool) -> None:
    """Send the logs of the server and of uvicorn to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if json_lines else LineFormatter())
    for name in ("sparsight", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def _value(value: Any) -> str:
    """A value without spaces or quotation marks as it is, any other as JSON."""
    return str(value) if re.fullmatch(r"[\w./:-]+", str(value)) else json.dumps(value)
