"""API keys: who may send requests, and how many."""

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope

from sparsight.server.errors import APIError
from sparsight.server.middleware import Guard
from sparsight.utils.text import printable

OPEN_PATH, PAGE, PAGE_FILES, METRICS = "/health", "/", "/page/", "/metrics"
"""What needs no key: a browser sends none when it opens the page, whose files are the same everywhere."""

_KEY = re.compile(r"[!-~]{16,256}")


def read_keys(path: str | Path) -> list[str]:
    """The keys in a file: one per line; empty lines and lines that begin with ``#`` are left out.

    Raises:
        ValueError: the file cannot be read, has no key, or has one that is not 16 to 256 printable ASCII characters.
    """
    name = printable(path)
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the file with API keys, {name}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    for number, line in numbered:
        if not _KEY.fullmatch(line):
            raise ValueError(f"Line {number} of {name} must be a key of 16 to 256 ASCII characters without spaces.")
    if not numbered:
        raise ValueError(f"There is no API key in {name}: it has one per line.")
    return [line for _, line in numbered]


class KeyGuard(Guard):
    """Asks for ``Authorization: Bearer KEY`` on every path except ``/health`` and the page's own files.

    The SHA-256 of a request's key is left in ``scope["state"]["key_id"]``, as a salt for caches.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        super().__init__(app)
        self._digests = [_digest(key.encode()) for key in keys]

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """Compare the key."""
        if not is_open(scope):
            key_id = self.identify(scope["headers"])
            if key_id is None:
                message = "The API key is missing or wrong: send Authorization: Bearer KEY."
                raise APIError(401, message, code="invalid_api_key")
            scope.setdefault("state", {})["key_id"] = key_id
        return receive

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """The digest of the key in a request's headers; None if there is no valid one."""
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = _digest(key.strip())
        # All of them are compared, and each in constant time.
        known = sum(hmac.compare_digest(digest, each) for each in self._digests)
        return digest if known and scheme.lower() == b"bearer" else None


class RateLimit(Guard):
    """Limits the requests of each API key, or of all clients together if there are no keys.

    A key may send ``per_minute`` requests at once, and gets them back evenly over a minute. What needs no key does not
    count, nor does :data:`METRICS`, which dashboards ask for every few seconds.
    """

    def __init__(self, app: ASGIApp, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(app)
        self.per_minute, self._clock = per_minute, clock
        # Requests that a key may send, as of a time.
        self._buckets: dict[str | None, tuple[float, float]] = {}

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """Count."""
        wait = 0.0 if is_open(scope) or scope["path"] == METRICS else self._take(scope.get("state", {}).get("key_id"))
        if wait:
            message = f"There may be at most {self.per_minute:,} requests a minute."
            raise APIError(429, message, kind="requests", code="rate_limit_exceeded", retry_after=math.ceil(wait))
        return receive

    def _take(self, key_id: str | None) -> float:
        """Count a request, or return the seconds to wait if there may be none now."""
        now, rate = self._clock(), self.per_minute / 60
        left, then = self._buckets.get(key_id, (self.per_minute, now))
        left = min(self.per_minute, left + (now - then) * rate)
        self._buckets[key_id] = (left if left < 1 else left - 1), now
        return max(0.0, (1 - left) / rate)


def is_open(scope: Scope) -> bool:
    """Whether a request needs no key."""
    path: str = scope["path"]
    return path == OPEN_PATH or (scope["method"] == "GET" and (path == PAGE or path.startswith(PAGE_FILES)))


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
