"""Every door that was found open in other servers, tried on a server that runs."""

import asyncio
import http.client
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from PIL import Image

import sparsight
from sparsight.server.access_log import JsonFormatter
from sparsight.server.app import create_app
from sparsight.server.images import ImageLoader
from sparsight.server.settings import Settings
from tests.server.attacker import DOMAIN, PUBLIC, Attacker, answering, respond
from tests.server.conftest import MODEL, QUESTION, RECEIPT, RunningServer, asking
from tests.server.crafted import SVG, data_url, encoded, png, scan_bomb, text_bomb
from tests.server.test_middleware import answer as call

KEYS = ("the-key-of-the-first-client", "the-key-of-the-second-client")
CHAT = "/v1/chat/completions"
LINK = f"https://{DOMAIN}/receipt.png"

Response = tuple[int, Any]

LEAKS = re.compile(
    r"0x[0-9a-f]{6}|/(usr|home|root|tmp|work|etc|opt|proc)\b|\.py\b|site-packages|Traceback|object at|line \d+"
    r"|PIL|pydantic|torch|transformers|tokenizers|starlette|uvicorn|h11|jinja|ssl|errno|127\.0\.0\.1",
    re.IGNORECASE,
)
"""What an error must not say: addresses in memory, paths, names of libraries, addresses of the network."""


@pytest.fixture(scope="module")
def attacker() -> Iterator[Attacker]:
    """The server behind the only domain that images may come from, in a thread of its own."""
    attacker, loop = Attacker(answering(RECEIPT.read_bytes())), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(attacker.__aenter__(), loop).result()
    yield attacker
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def guarded(attacker: Attacker) -> Iterator[RunningServer]:
    """A server with keys and a domain for images, whose limits are short."""
    settings = Settings(
        image_seconds=2.0, body_seconds=1.0, header_seconds=1.0, max_image_bytes=500_000, max_body_bytes=2_000_000
    )
    fetcher = attacker.fetcher(max_bytes=settings.max_image_bytes, seconds=1.0)
    model, processor = sparsight.load()
    engine = sparsight.Engine(model, processor, kv_memory=2**26)
    with RunningServer(create_app(engine, MODEL, settings, ImageLoader(settings, fetcher), KEYS)) as running:
        yield running


@pytest.fixture
def plays(attacker: Attacker) -> Attacker:
    """The attacker with its usual behaviour and nothing noted."""
    attacker.handler, attacker.addresses = answering(RECEIPT.read_bytes()), [[PUBLIC]]
    for notes in (attacker.requests, attacker.connections, attacker.lookups):
        notes.clear()
    return attacker


def send(
    server: RunningServer,
    method: str,
    path: str,
    body: Any = None,
    key: str | None = KEYS[0],
    headers: Sequence[tuple[str, str]] = (),
) -> Response:
    """Status and JSON of a response; headers replace the usual ones of the same name."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    usual = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content))}
    if key is not None:
        usual["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in [*(each for each in usual.items() if each[0] not in dict(headers)), *headers]:
        connection.putheader(name, value)
    try:
        connection.endheaders(content)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text.decode()


def ask(server: RunningServer, url: str | None = None, text: str = QUESTION, **fields: Any) -> Response:
    body = {"model": MODEL, "messages": asking(text, url), "temperature": 0} | fields
    return send(server, "POST", CHAT, body)


def message(response: Response, status: int = 400) -> str:
    """The sentence of an error of OpenAI's shape, in which nothing leaks."""
    assert response[0] == status, response
    error = response[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not LEAKS.search(json.dumps(error).replace(DOMAIN, ""))
    return error["message"]


def answer(response: Response) -> str:
    assert response[0] == 200, response
    return response[1]["choices"][0]["message"]["content"]


@pytest.fixture(autouse=True)
def answers_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to the server, the next client gets its answer."""
    yield
    for name in ("guarded", "server"):
        if name in request.fixturenames:
            assert answer(ask(request.getfixturevalue(name))) == "461"


# Keys


def paths(server: RunningServer) -> Iterator[str]:
    schema = send(server, "GET", "/openapi.json")[1]
    for path in schema["paths"]:
        yield re.sub(r"\{[^}]*\}", "x", path)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE", "TRACE", "XYZ"])
@pytest.mark.parametrize("key", [None, "wrong"])
def test_every_path_and_method_needs_a_key(guarded: RunningServer, method: str, key: str | None) -> None:
    known = [*paths(guarded), "/metrics", "/docs", "/redoc", "/openapi.json", "/nothing", "/v1", "/health/"]
    assert {CHAT, "/v1/models", "/ready", "/health"} <= set(known)
    for path in known:
        if path != "/health":
            assert send(guarded, method, path, key=key)[0] == 401, path
    assert send(guarded, "GET", "/health", key=key) == (200, {"status": "ok"})
    # The page's own files are the same everywhere.
    for path in ("/", "/page/page.js"):
        assert send(guarded, method, path, key=key)[0] == (200 if method == "GET" else 401), path
    assert send(guarded, method, "/page/../v1/models", key=key)[0] == (404 if method == "GET" else 401)


@pytest.mark.parametrize("path", ["//v1/models", "/health/../v1/models", "/health%2f..%2fv1/models", "/v1/./models"])
def test_a_path_in_another_spelling_needs_a_key(guarded: RunningServer, path: str) -> None:
    assert send(guarded, "GET", path, key=None)[0] == 401


def test_a_websocket_needs_a_key(guarded: RunningServer) -> None:
    upgrade = [
        ("Connection", "upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "a"),
        ("Sec-WebSocket-Version", "13"),
    ]
    assert send(guarded, "GET", "/v1/realtime", key=None, headers=upgrade)[0] == 401
    assert send(guarded, "GET", "/v1/realtime", headers=upgrade)[0] == 404


def test_a_key_is_not_read_from_elsewhere(guarded: RunningServer) -> None:
    places = [("X-API-Key", KEYS[0]), ("Cookie", f"key={KEYS[0]}"), ("Proxy-Authorization", f"Bearer {KEYS[0]}")]
    assert send(guarded, "GET", f"/v1/models?key={KEYS[0]}", key=None, headers=places)[0] == 401


def test_the_client_of_openai_understands_a_missing_key(guarded: RunningServer) -> None:
    assert [each.id for each in guarded.client(api_key=KEYS[1]).models.list()] == [MODEL]
    with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
        guarded.client(api_key="wrong").models.list()


def test_requests_are_counted_by_key(guarded: RunningServer) -> None:
    settings = Settings(requests_per_minute=2)
    app = create_app(guarded.service.engine, MODEL, settings, ImageLoader(settings), KEYS)

    async def statuses(key: str) -> list[int]:
        return [(await call(app, (), "/v1/models", authorization=f"Bearer {key}"))[0] for _ in range(3)]

    assert asyncio.run(statuses(KEYS[0])) == [200, 200, 429]
    assert asyncio.run(statuses(KEYS[1])) == [200, 200, 429]
    assert asyncio.run(statuses("wrong")) == [401, 401, 401]


def test_what_a_request_kept_is_for_its_own_key(guarded: RunningServer) -> None:
    id = ask(guarded)[1]["id"]
    assert send(guarded, "GET", f"/v1/sparsight/kept/{id}")[0] == 200
    message(send(guarded, "GET", f"/v1/sparsight/kept/{id}", key=KEYS[1]), 404)


def test_logs_have_no_keys_questions_and_images(guarded: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ask(guarded)
        ask(guarded, "data:image/png;base64,AAAA")
        send(guarded, "GET", "/v1/models", key="a wrong key that is logged")
        # A request is logged after its response, and before the next request.
        send(guarded, "GET", "/health")
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert sum('"status": 401' in line for line in lines) == 1
    log = "".join(lines)
    assert not any(each in log for each in (KEYS[0], QUESTION, "a wrong key", "base64", "iVBOR"))


def test_pages_of_other_domains_cannot_use_a_server_without_keys(server: RunningServer) -> None:
    body = {"model": MODEL, "messages": asking()}
    for host in ("evil.example", "localhost.evil.example:8000"):
        message(send(server, "POST", CHAT, body, headers=[("Host", host)]), 403)
    # What a page may send to another domain without a permission, which is never given.
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        message(send(server, "POST", CHAT, body, headers=[("Content-Type", content_type)]))
    with connect(server, f"Content-Length: {len(json.dumps(body))}") as client:
        client.sendall(json.dumps(body).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    message(send(server, "OPTIONS", CHAT, headers=[("Origin", "http://evil.example")]), 405)


# Links


def test_a_link_to_an_allowed_domain_is_answered(guarded: RunningServer, plays: Attacker) -> None:
    assert answer(ask(guarded, LINK)) == "461"
    assert plays.connections == [(PUBLIC, 443, DOMAIN)]


def test_links_are_refused_unless_a_domain_is_named(server: RunningServer, plays: Attacker) -> None:
    assert "links are not fetched" in message(ask(server, LINK))
    assert not plays.lookups


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        str(RECEIPT),
        f"file://{RECEIPT}",
        f"file://{DOMAIN}/{RECEIPT}",
        f"http://{DOMAIN}/a.png",
        "https://127.0.0.1/a.png",
        "https://169.254.169.254/latest/meta-data/",
        f"https://127.0.0.1\\@{DOMAIN}/",
        f"https://{DOMAIN}:22/",
        "https://other.example.com/a.png",
        "data:text/plain;base64,AAAA",
    ],
)
def test_files_and_other_links_are_refused(guarded: RunningServer, plays: Attacker, url: str) -> None:
    message(ask(guarded, url))
    assert not plays.lookups


def test_redirects_are_not_followed_to_private_addresses(guarded: RunningServer, plays: Attacker) -> None:
    plays.handler = respond(b"HTTP/1.1 302 Found", b"Location: https://127.0.0.1/a.png", b"Content-Type: image/png")
    assert "redirect" in message(ask(guarded, LINK))
    assert len(plays.requests) == 1


def test_a_name_is_not_resolved_again_for_the_connection(guarded: RunningServer, plays: Attacker) -> None:
    plays.addresses = [[PUBLIC], ["127.0.0.1"]]
    assert answer(ask(guarded, LINK)) == "461"
    assert plays.connections == [(PUBLIC, 443, DOMAIN)]
    message(ask(guarded, LINK))
    assert len(plays.connections) == 1


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fd00::1"])
def test_private_addresses_are_not_connected_to(guarded: RunningServer, plays: Attacker, address: str) -> None:
    plays.addresses = [[PUBLIC, address]]
    message(ask(guarded, LINK))
    assert not plays.connections


@pytest.mark.parametrize("endless", [False, True])
def test_slow_and_endless_bodies_are_given_up(guarded: RunningServer, plays: Attacker, endless: bool) -> None:
    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        while True:
            writer.write(bytes(2**16 if endless else 1))
            await writer.drain()
            await asyncio.sleep(0 if endless else 0.05)

    plays.handler = handler
    expected = "An image may have at most 500,000 bytes." if endless else "An image took too long to fetch."
    assert message(ask(guarded, LINK)) == expected


@pytest.mark.parametrize("content", [SVG, text_bomb(), png(50_000, 50_000)])
def test_what_a_link_leads_to_has_the_limits_of_all_images(
    guarded: RunningServer, plays: Attacker, content: bytes
) -> None:
    plays.handler = answering(content)
    message(ask(guarded, LINK))


def test_links_in_texts_are_not_fetched(guarded: RunningServer, plays: Attacker) -> None:
    assert ask(guarded, text=f"{QUESTION} {LINK} ![]({LINK})", max_tokens=2)[0] == 200
    assert not plays.lookups


# Images


def test_responses_have_the_same_doors(guarded: RunningServer, plays: Attacker) -> None:
    def respond_to(url: str, text: str = QUESTION, **fields: Any) -> Response:
        parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": text}]
        body = {"model": MODEL, "input": [{"role": "user", "content": parts}]} | fields
        return send(guarded, "POST", "/v1/responses", body)

    for url in (
        "/etc/passwd",
        f"http://{DOMAIN}/a.png",
        data_url(SVG),
        data_url(png(1, 100_000)),
        data_url(bytes(500_001)),
    ):
        message(respond_to(url))
    assert "<image>" in message(respond_to(LINK, "<image>"))
    assert "max_output_tokens" in message(respond_to(LINK, max_output_tokens=10**9))
    assert not plays.lookups
    assert respond_to(LINK)[0] == 200


def test_formats_that_are_not_accepted(guarded: RunningServer) -> None:
    for format in ("EPS", "BMP", "TIFF", "PDF", "ICO"):
        url = data_url(encoded(Image.new("RGB", (32, 32)), format))
        assert message(ask(guarded, url)) == "An image must be in one of the formats PNG, JPEG, WEBP, GIF."


@pytest.mark.parametrize(
    "content",
    [
        SVG,
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%id) run",
        png(50_000, 50_000),
        png(1, 100_000),
        png(5, 5),
        text_bomb(),
    ],
    ids=["svg", "empty", "postscript", "pixels", "shape", "truncated", "text"],
)
def test_hostile_images(guarded: RunningServer, content: bytes) -> None:
    message(ask(guarded, data_url(content)))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 200)])
def test_tiny_images_are_answered(guarded: RunningServer, size: tuple[int, int]) -> None:
    for mode in ("RGB", "1", "RGBA", "I;16"):
        assert ask(guarded, data_url(encoded(Image.new(mode, size))), max_tokens=1)[0] == 200


def test_an_image_that_never_ends_to_decode(guarded: RunningServer) -> None:
    assert message(ask(guarded, data_url(scan_bomb(10_000)))) == "An image takes too long to decode."


def test_too_many_bytes_in_an_image(guarded: RunningServer) -> None:
    assert message(ask(guarded, data_url(bytes(500_001)))) == "An image may have at most 500,000 bytes."


def test_too_many_images(guarded: RunningServer) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_url(encoded(Image.new("RGB", (1, 1))))}}] * 17
    assert "images" in message(ask(guarded, messages=[{"role": "user", "content": content}]))


def test_other_media_are_refused(guarded: RunningServer) -> None:
    for kind in ("video_url", "input_audio", "file", "image", "image_embeds"):
        part = {"type": kind, kind: {"url": "data:video/jpeg;base64," + "AAAA," * 1000}}
        message(ask(guarded, messages=[{"role": "user", "content": [part]}]))


# Texts and numbers


def test_placeholders_in_texts_are_refused(guarded: RunningServer) -> None:
    for token in ("<image>", "</s>", "<|assistant|>", "<|user|>", "<s>", "<pad>", "<unk>"):
        text = f"What is {token}?"
        assert token in message(ask(guarded, text=text))
        for role in ("system", "user", "assistant"):
            message(ask(guarded, messages=[{"role": role, "content": text}, *asking()]))
        message(send(guarded, "POST", "/v1/completions", {"model": MODEL, "prompt": text}))


@pytest.mark.parametrize("field", ["n", "max_tokens", "max_completion_tokens", "top_logprobs", "logit_bias", "stop"])
def test_numbers_have_bounds(guarded: RunningServer, field: str) -> None:
    for value in (-1, 10**9, 2**63, 10**30, 1.5, 1e308, [1] * 10_000, {"0": 10**9}):
        assert field in message(ask(guarded, logprobs=True, **{field: value}))


@pytest.mark.parametrize(
    "field", ["chat_template", "chat_template_kwargs", "documents", "tools", "mm_processor_kwargs"]
)
def test_templates_and_code_are_not_taken(guarded: RunningServer, field: str) -> None:
    template = "{% for i in range(10**9) %}{% endfor %}{{ cycler.__init__.__globals__.os.popen('id').read() }}"
    assert field in message(ask(guarded, **{field: {"x": template}}))


def test_a_text_is_not_a_template(guarded: RunningServer) -> None:
    assert ask(guarded, text="{% for i in range(10**9) %}{% endfor %} {{ messages }}", max_tokens=1)[0] == 200


def test_a_prompt_longer_than_the_context(guarded: RunningServer) -> None:
    assert "context" in message(ask(guarded, text="a " * 5000))


# Bodies, headers and connections


def address(server: RunningServer) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return str(parts.hostname), int(parts.port or 0)


def connect(server: RunningServer, framing: str) -> socket.socket:
    """A connection on which the headers of a request have been sent."""
    client = socket.create_connection(address(server))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n{framing}\r\n\r\n"
    client.sendall(head.encode())
    return client


def test_large_bodies(guarded: RunningServer) -> None:
    expected = "A request's body may have at most 2,000,000 bytes."
    assert message(send(guarded, "POST", CHAT, b" " * 2_000_001), 413) == expected
    with connect(guarded, "Transfer-Encoding: chunked") as client:
        for _ in range(40):
            client.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_trickles_in(guarded: RunningServer) -> None:
    with connect(guarded, "Content-Length: 1000") as client:
        client.settimeout(0.1)
        for _ in range(100):
            client.sendall(b" ")
            try:
                assert client.recv(100).startswith(b"HTTP/1.1 408 ")
                return
            except TimeoutError:
                pass
    raise AssertionError("The server waits.")


def test_headers_that_trickle_in(guarded: RunningServer) -> None:
    with socket.create_connection(address(guarded)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert client.recv(100) == b""


@pytest.mark.parametrize(
    "headers",
    [[(f"X-{index}", "x") for index in range(10_000)], [("X", "x")] * 101, [("X", "x" * 20_000)], [("X", "x" * 10**6)]],
    ids=["10,000", "101", "20 kB", "1 MB"],
)
def test_large_headers(guarded: RunningServer, headers: list[tuple[str, str]]) -> None:
    try:
        response = send(guarded, "GET", "/health", headers=headers)
    except (BrokenPipeError, ConnectionResetError):
        # The server has closed the connection before everything was sent.
        return
    assert message(response, response[0])
    assert response[0] in (400, 431)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[" + b"{}," * 500_000 + b"{}]",
        b'{"n": ' + b"1" * 1_000_000 + b"}",
        b'{"temperature": NaN}',
        b'{"model": "\\ud800"}',
        b"\xff\xfe",
        b"null",
        b"",
    ],
    ids=["brackets", "nesting", "objects", "values", "digits", "nan", "surrogate", "bytes", "null", "empty"],
)
def test_hostile_json(guarded: RunningServer, body: bytes) -> None:
    response = send(guarded, "POST", CHAT, body)
    message(response, response[0])
    assert response[0] in (400, 413)


def test_errors_of_the_router_have_the_shape_of_all_errors(guarded: RunningServer) -> None:
    message(send(guarded, "GET", "/etc/passwd"), 404)
    message(send(guarded, "DELETE", CHAT), 405)
    message(send(guarded, "GET", "/v1/models/..%2f..%2fetc%2fpasswd"), 404)


# The event loop


def healthy_while(server: RunningServer, body: Any, times: int = 5) -> Response:
    """The response to a request, after whose body was read /health answered several times, one after the other."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(send, server, "POST", CHAT, body)
        while not (server.service.active or pending.done()):
            time.sleep(0.001)
        for _ in range(times):
            assert send(server, "GET", "/health", key=None) == (200, {"status": "ok"})
            assert not pending.done()
        return pending.result()


def test_an_image_does_not_block_other_clients(guarded: RunningServer) -> None:
    body = {"model": MODEL, "messages": asking(url=data_url(scan_bomb(10_000)))}
    message(healthy_while(guarded, body))


def test_a_long_text_does_not_block_other_clients(guarded: RunningServer) -> None:
    body = {"model": MODEL, "messages": asking("hello world " * 80_000)}
    message(healthy_while(guarded, body))


def test_a_long_answer_does_not_block_other_clients(guarded: RunningServer) -> None:
    body = {"model": MODEL, "messages": asking(), "max_tokens": 200, "ignore_eos": True, "n": 4}
    assert healthy_while(guarded, body)[0] == 200
