"""Limits on what clients send: middleware alone, and the protocol under an application of a few lines."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from sparsight.server.keys import KeyGuard, RateLimit, read_keys
from sparsight.server.middleware import MAX_ITEMS, BodyLimit, HeaderLimit, LocalHost
from sparsight.server.protocol import limited_protocol

KEYS = ("correct-horse-battery", "staple-staple-staple")


class Echo:
    """An application that answers with the body, and notes what it was given."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        message = await receive()
        self.messages.append(message)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message.get("body", b"")})


def request(*parts: bytes) -> list[dict[str, Any]]:
    """The messages of a body in parts."""
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": index < last} for index, part in enumerate(parts)]


async def answer(
    app: Any, messages: Sequence[dict[str, Any]] = (), path: str = "/", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of a response; JSON is parsed. After the messages nothing is received."""
    coming, sent = list(messages or request(b"")), []

    async def receive() -> dict[str, Any]:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": raw,
    }
    await app(scope, receive, send)
    start, body = sent[0], b"".join(message.get("body", b"") for message in sent[1:])
    decoded = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], json.loads(body) if decoded else body, decoded


def call(app: Any, *arguments: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
    return asyncio.run(answer(app, *arguments, **headers))


def sentence(response: tuple[int, Any, dict[str, str]], status: int) -> str:
    """The message of an error of OpenAI's shape."""
    assert response[0] == status
    error = response[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def test_headers_are_counted() -> None:
    app = HeaderLimit(Echo(), max_headers=3, max_bytes=100)
    assert call(app, a="1", b="2", c="3")[0] == 200
    wrong = "A request may have at most 3 headers and 100 bytes of them."
    assert sentence(call(app, a="1", b="2", c="3", d="4"), 431) == wrong


def test_bytes_of_headers_and_path_are_counted() -> None:
    app = HeaderLimit(Echo(), max_headers=3, max_bytes=100)
    assert call(app, a="x" * 98)[0] == 200
    assert call(app, a="x" * 99)[0] == 431
    assert call(app, (), "/" + "x" * 99)[0] == 200
    assert call(app, (), "/" + "x" * 100)[0] == 431


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "192.168.1.5:8000", "[::1]", "[::1]:8000"]
)
def test_a_host_that_is_an_address_passes(host: str) -> None:
    assert call(LocalHost(Echo()), host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "127.1", ":80"],
)
def test_a_host_that_is_a_domain_is_refused(host: str) -> None:
    wrong = "Without API keys, this server answers to localhost and IP addresses only, not to domains."
    assert sentence(call(LocalHost(Echo()), host=host), 403) == wrong


def body_limit(app: Any, max_bytes: int = 10, max_total: int = 100, seconds: float = 5.0) -> BodyLimit:
    return BodyLimit(app, max_bytes, max_total, seconds)


TOO_LARGE = "A request's body may have at most 10 bytes."


def test_a_body_arrives_in_one_piece() -> None:
    app = Echo()
    assert call(body_limit(app), request(b"01234", b"", b"56789"), content_length="10")[1] == b"0123456789"
    assert app.messages == [{"type": "http.request", "body": b"0123456789", "more_body": False}]


def test_a_body_that_is_declared_too_large_is_not_read() -> None:
    messages = request(b"never read")
    assert sentence(call(body_limit(Echo()), messages, content_length="11"), 413) == TOO_LARGE
    assert sentence(call(body_limit(Echo()), [{"type": "unknown"}], content_length="1e1"), 413) == TOO_LARGE


def test_a_body_of_unknown_length_is_counted_while_it_is_read() -> None:
    app = Echo()
    assert sentence(call(body_limit(app), request(*[b"0123"] * 1000)), 413) == TOO_LARGE
    assert not app.scopes


def test_a_slow_body_is_given_up() -> None:
    incomplete = request(b"01", b"23")[:1]
    wrong = "A request's body must arrive within 0.05 seconds."
    assert sentence(call(body_limit(Echo(), seconds=0.05), incomplete), 408) == wrong


def test_all_bodies_together_are_limited() -> None:
    async def run() -> None:
        app = body_limit(Echo(), max_total=15)
        incomplete = asyncio.ensure_future(answer(app, request(b"0123456789", b"")[:1]))
        await asyncio.sleep(0)
        response = await answer(app, request(b"012345"))
        assert sentence(response, 503) == "The server is busy: too many requests are being read."
        assert response[2]["retry-after"] == "1"
        assert (await answer(app, request(b"01234")))[1] == b"01234"
        incomplete.cancel()
        await asyncio.gather(incomplete, return_exceptions=True)
        assert (await answer(app, request(b"012345")))[1] == b"012345"

    asyncio.run(run())


@pytest.mark.parametrize("bomb", [b"[" * (MAX_ITEMS + 1), b"[" + b"1," * MAX_ITEMS, b"[" + b"{}," * (MAX_ITEMS // 2)])
def test_a_body_of_too_many_values_is_not_parsed(bomb: bytes) -> None:
    app = Echo()
    response = call(body_limit(app, 2**24, 2**24), request(bomb))
    assert sentence(response, 413) == "A request's body may have at most 262,144 commas and opening brackets."
    assert not app.scopes


def test_a_client_that_goes_is_passed_on() -> None:
    app = Echo()
    call(body_limit(app), [*request(b"01", b"")[:1], {"type": "http.disconnect"}])
    assert app.messages == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_a_key_opens_every_path_and_leaves_its_digest(key: str, scheme: str) -> None:
    app = Echo()
    assert call(KeyGuard(app, KEYS), (), "/v1/models", authorization=f"{scheme} {key}")[0] == 200
    assert app.scopes[0]["state"] == {"key_id": hashlib.sha256(key.encode()).hexdigest()}


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {KEYS[0].upper()}",
        f"Bearer {KEYS[0]} {KEYS[1]}",
        f"Basic {KEYS[0]}",
        KEYS[0],
        f"Bearer {hashlib.sha256(KEYS[0].encode()).hexdigest()}",
    ],
)
@pytest.mark.parametrize(
    "path", ["/page", "/v1/models", "/health/", "/Health", "//health", "/health/../metrics", "/nothing"]
)
def test_without_a_key_there_is_no_other_path(authorization: str, path: str) -> None:
    app = Echo()
    response = call(KeyGuard(app, KEYS), (), path, authorization=authorization)
    assert sentence(response, 401) == "The API key is missing or wrong: send Authorization: Bearer KEY."
    assert response[2]["www-authenticate"] == "Bearer"
    assert not app.scopes
    assert call(KeyGuard(app, KEYS), (), "/health", authorization=authorization)[0] == 200


def test_two_authorizations_are_none() -> None:
    guard, header = KeyGuard(Echo(), KEYS), (b"authorization", f"Bearer {KEYS[0]}".encode())
    assert guard.identify([header]) is not None
    assert guard.identify([header, header]) is None


def test_keys_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# A comment\n\n  {KEYS[0]}  \r\n{KEYS[1]}")
    assert read_keys(path) == list(KEYS)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "There is no API key in .*keys: it has one per line"),
        (b"# only a comment\n", "There is no API key in"),
        (b"short\n", "Line 1 of .*keys must be a key of 16 to 256 ASCII characters without spaces"),
        (b"\n\ntwo words of a key\n", "Line 3 of"),
        ("ä".encode() * 20, "Line 1 of"),
        (b"\xff" * 20, "Cannot read the file with API keys"),
    ],
)
def test_a_file_without_proper_keys_is_refused(tmp_path: Path, content: bytes, wrong: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=wrong):
        read_keys(path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read the file with API keys, .*nothing\."):
        read_keys(tmp_path / "nothing")


def test_each_key_has_its_own_rate() -> None:
    now = 0.0
    app = KeyGuard(RateLimit(Echo(), per_minute=2, clock=lambda: now), KEYS)

    def send(key: str, path: str = "/v1/models") -> tuple[int, Any, dict[str, str]]:
        return call(app, (), path, authorization=f"Bearer {key}")

    assert [send(KEYS[0])[0] for _ in range(3)] == [200, 200, 429]
    assert sentence(send(KEYS[0]), 429) == "There may be at most 2 requests a minute."
    assert send(KEYS[0])[2]["retry-after"] == "30"
    for path in ("/health", "/metrics", "/", "/page/page.js"):
        assert send(KEYS[0], path)[0] == 200
    assert send(KEYS[1])[0] == 200
    now = 29.0
    assert send(KEYS[0])[2]["retry-after"] == "1"
    now = 30.0
    assert [send(KEYS[0])[0] for _ in range(2)] == [200, 429]
    now = 1000.0
    assert [send(KEYS[0])[0] for _ in range(3)] == [200, 200, 429]


def test_without_keys_all_clients_share_a_rate() -> None:
    app = RateLimit(Echo(), per_minute=1)
    assert [call(app, (), "/v1/models")[0] for _ in range(2)] == [200, 429]


def with_protocol(
    app: Any, work: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]], **seconds: Any
) -> Any:
    """The result of some work with a connection to an application under uvicorn's protocol."""

    async def run() -> Any:
        config = uvicorn.Config(
            app, log_config=None, ws="none", timeout_keep_alive=1, h11_max_incomplete_event_size=1000
        )
        limits = {"header_seconds": 5.0, "send_seconds": 5.0, "max_connections": 2} | seconds
        protocol, state = limited_protocol(**limits), ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            return await asyncio.wait_for(work(reader, writer), 10)
        finally:
            writer.transport.abort()
            server.close()

    return asyncio.run(run())


GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("start", [b"", b"G", GET])
def test_a_client_that_stops_in_its_headers_is_disconnected(start: bytes, earlier: bool) -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        if earlier:
            writer.write(GET + b"\r\n")
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(start)
        return await reader.read()

    assert with_protocol(Echo(), work, header_seconds=0.2) == b""


def test_a_client_that_sends_header_by_header_is_disconnected() -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(GET + b"\r\n" + GET)
        while not reader.at_eof() and not writer.is_closing():
            writer.write(b"a: b\r\n")
            await asyncio.sleep(0.05)
        return b"closed"

    assert with_protocol(Echo(), work, header_seconds=0.2) == b"closed"


def test_a_request_that_takes_long_is_not_disconnected() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.4)
        await Echo()(scope, receive, send)

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(GET + b"\r\n")
        return await reader.readuntil(b"\r\n\r\n")

    assert with_protocol(slow, work, header_seconds=0.1).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_sends_on_after_its_answer_is_disconnected() -> None:
    app = body_limit(Echo())

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        while not writer.is_closing():
            writer.write(bytes(1000))
            await asyncio.sleep(0.01)
        return head

    assert with_protocol(app, work, header_seconds=0.2).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_does_not_read_is_disconnected() -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
        left.set()

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()
        writer.write(GET + b"\r\n")
        await left.wait()

    left = asyncio.Event()
    with_protocol(endless, work, send_seconds=0.2)


@pytest.mark.parametrize(
    "start",
    [
        b"\0\0\0\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        GET + b"a: " + b"b" * 10_000,
        GET + b"a : b\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_in_the_shape_of_all_errors(start: bytes) -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(start)
        return await reader.read()

    head, _, body = with_protocol(Echo(), work).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    response = 400, json.loads(body), {}
    assert sentence(response, 400) == "The request is not valid HTTP, or its headers are too large."


@pytest.mark.parametrize("framing", [b"Content-Length: 1\r\nContent-Length: 2", b"Transfer-Encoding: x"])
def test_ambiguous_framing_is_refused(framing: bytes) -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(GET + framing + b"\r\n\r\n")
        return await reader.readline()

    assert with_protocol(Echo(), work) == b"HTTP/1.1 400 Bad Request\r\n"
