"""Links to images: which are followed, and what their servers cannot do."""

import asyncio
import socket
from collections.abc import Sequence

import pytest

from sparsight.server.errors import APIError
from sparsight.server.fetch import Fetcher, is_public, resolve
from tests.server.attacker import DOMAIN, PUBLIC, Attacker, Handler, answering, respond

LINK = f"https://{DOMAIN}/a.png"

FAILED = "An image could not be fetched."
BAD_LINK = "A link to an image must be like https://example.com/a.png, with 4,096 characters at most."
NOT_ALLOWED = "Images from this domain are not allowed."
TOO_LARGE = "An image may have at most 10,000 bytes."
REDIRECT = "A link to an image leads to a redirect, which is not followed."
SOMETHING_ELSE = "A link to an image leads to something else."
SLOW = "An image took too long to fetch."


def fetch(attacker: Attacker, link: str = LINK, **options: object) -> bytes:
    async def run() -> bytes:
        async with attacker:
            return await attacker.fetcher(**options).fetch(link)

    return asyncio.run(run())


def refused(attacker: Attacker, link: str = LINK, **options: object) -> str:
    with pytest.raises(APIError) as raised:
        fetch(attacker, link, **options)
    assert (raised.value.status, raised.value.code) == (400, "invalid_image")
    return raised.value.message


def test_the_checked_address_is_connected_to_under_the_name_of_the_host() -> None:
    attacker = Attacker(answering(b"pixels"))
    assert fetch(attacker, f"https://{DOMAIN.upper()}/a.png?size=1") == b"pixels"
    assert attacker.connections == [(PUBLIC, 443, DOMAIN)]
    (request,) = attacker.requests
    assert request.startswith(b"GET /a.png?size=1 HTTP/1.1\r\n")
    assert f"Host: {DOMAIN}\r\n".encode() in request


@pytest.mark.parametrize(
    "response",
    [
        respond(b"HTTP/1.1 200 OK", b"Content-Type: IMAGE/PNG; a=b", body=b"pixels"),
        respond(
            b"HTTP/1.1 200 OK",
            b"Content-Type: image/png",
            b"Transfer-Encoding: chunked",
            body=b"6\r\npixels\r\n0\r\n\r\n",
        ),
        respond(b"HTTP/1.1 103 Early Hints", b"", b"HTTP/1.0 200 OK", b"content-type: image/png", body=b"pixels"),
    ],
)
def test_every_framing_of_a_body_is_read(response: Handler) -> None:
    assert fetch(Attacker(response)) == b"pixels"


@pytest.mark.parametrize(
    "link",
    [
        f"http://{DOMAIN}/",
        f"file://{DOMAIN}/etc/passwd",
        f"HTTPS:/{DOMAIN}/",
        f"https://{DOMAIN}:443/",
        f"https://{DOMAIN}:8443/",
        f"https://user@{DOMAIN}/",
        f"https://user:password@{DOMAIN}/",
        f"https://{DOMAIN}@127.0.0.1/",
        f"https://127.0.0.1\\@{DOMAIN}/",
        f"https://127.0.0.1#@{DOMAIN}/",
        f"https://{DOMAIN}\\.evil.example/",
        f"https://{DOMAIN}./",
        f"https://{DOMAIN}?a",
        f"https://{DOMAIN}/a#b",
        f"https://{DOMAIN}/a b",
        f"https://{DOMAIN}/\r\nHost: evil.example",
        f"https://{DOMAIN}/\n",
        f" https://{DOMAIN}/",
        f"https://{DOMAIN}/" + "a" * 4096,
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://127.0.0.1.:443/",
        "https://[::1]/",
        "https://localhost/",
        "https://\u24d4xample.com/",
        "https://image\u017f.example.com/",
        f"https://{DOMAIN}/\u212a",
        "https://images\u3002example\u3002com/",
        "https:///images.example.com/",
        "https://",
    ],
)
def test_an_unusual_link_is_not_even_resolved(link: str) -> None:
    attacker = Attacker(answering(b"pixels"))
    assert refused(attacker, link) == BAD_LINK
    assert not attacker.lookups


@pytest.mark.parametrize(
    ("domain", "host", "allowed"),
    [
        ("example.com", "example.com", True),
        ("example.com", "a.example.com", False),
        (".example.com", "example.com", True),
        (".example.com", "a.b.example.com", True),
        (".example.com", "evilexample.com", False),
        (".example.com", "example.com.evil.org", False),
        ("a.example.com", "b.example.com", False),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", True),
    ],
)
def test_domains(domain: str, host: str, allowed: bool) -> None:
    attacker = Attacker(answering(b"pixels"))
    # The certificate is for another name, so that no link succeeds.
    assert refused(attacker, f"https://{host}/", domains=[domain]) == (FAILED if allowed else NOT_ALLOWED)
    assert attacker.lookups == ([host] if allowed else [])


@pytest.mark.parametrize(
    "domain", ["", ".", "com", ".com", "Example.com", "*.example.com", "10.0.0.1", "https://a.com"]
)
def test_a_malformed_domain_is_refused_at_the_start(domain: str) -> None:
    with pytest.raises(ValueError, match=r"A domain must be like example\.com"):
        Fetcher([domain], max_bytes=1, seconds=1)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.8",
        "192.0.2.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "100::1",
        "2001:0:1::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd12::1",
        "fe80::1",
        "fe80::1%lo",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    attacker = Attacker(answering(b"pixels"), [[PUBLIC, address]])
    assert refused(attacker) == FAILED
    assert not attacker.connections


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)
    attacker = Attacker(answering(b"pixels"), [[address]])
    assert fetch(attacker) == b"pixels"
    assert attacker.connections == [(address, 443, DOMAIN)]


def test_a_second_answer_of_the_name_server_changes_nothing() -> None:
    attacker = Attacker(answering(b"pixels"), [[PUBLIC], ["127.0.0.1"]])
    assert fetch(attacker) == b"pixels"
    assert attacker.lookups == [DOMAIN]
    assert attacker.connections == [(PUBLIC, 443, DOMAIN)]


@pytest.mark.parametrize("addresses", [[], ["127.0.0.1"]])
def test_a_name_without_a_public_address_is_not_connected_to(addresses: Sequence[str]) -> None:
    attacker = Attacker(answering(b"pixels"), [addresses])
    assert refused(attacker) == FAILED
    assert not attacker.connections


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"303 See Other", b"307 Temporary", b"308 Permanent"])
@pytest.mark.parametrize("target", [b"http://169.254.169.254/", b"https://images.example.com/b.png"])
def test_redirects_are_not_followed(status: bytes, target: bytes) -> None:
    lines = b"HTTP/1.1 " + status, b"Location: " + target, b"Content-Type: image/png", b"Content-Length: 6"
    attacker = Attacker(respond(*lines, body=b"pixels"))
    assert refused(attacker) == REDIRECT
    assert len(attacker.connections) == len(attacker.requests) == 1


@pytest.mark.parametrize("content_type", [b"text/html", b"application/octet-stream", b"", b"x-image/png"])
def test_other_content_types_are_refused(content_type: bytes) -> None:
    assert refused(Attacker(answering(b"<html>", content_type))) == SOMETHING_ELSE


@pytest.mark.parametrize(
    "status", [b"204 No Content", b"206 Partial", b"401 Unauthorized", b"404 Not Found", b"500 Oh"]
)
def test_other_statuses_are_failures(status: bytes) -> None:
    assert refused(Attacker(respond(b"HTTP/1.1 " + status, b"Content-Type: image/png", body=b"pixels"))) == FAILED


def test_a_declared_length_is_checked_before_the_body_is_read() -> None:
    declared = respond(b"HTTP/1.1 200 OK", b"Content-Type: image/png", b"Content-Length: 10001")
    assert refused(Attacker(declared)) == TOO_LARGE
    assert fetch(Attacker(answering(bytes(10_000)))) == bytes(10_000)


@pytest.mark.parametrize("framing", [b"Connection: close", b"Transfer-Encoding: chunked"])
def test_an_endless_body_is_cut_off(framing: bytes) -> None:
    sent = 0

    async def handler(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await respond(b"HTTP/1.1 200 OK", b"Content-Type: image/png", framing)(writer)
        while True:
            writer.write(b"1000\r\n" + bytes(4096) + b"\r\n")
            await writer.drain()
            sent += 4096

    assert refused(Attacker(handler)) == TOO_LARGE
    # The rest is in the buffers of the sockets.
    assert sent < 2**25


def test_a_compressed_body_is_not_expanded() -> None:
    lines = b"HTTP/1.1 200 OK", b"Content-Type: image/png", b"Content-Encoding: gzip"
    assert refused(Attacker(respond(*lines, body=b"\x1f\x8b"))) == FAILED


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
@pytest.mark.parametrize("drip", [b"", b"a"])
def test_a_slow_server_is_given_up(head: bytes, drip: bytes) -> None:
    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(head.replace(b"\r\n\r\n", b"\r\nContent-Type: image/png\r\n\r\n"))
        while True:
            writer.write(drip)
            await writer.drain()
            await asyncio.sleep(0.01)

    assert refused(Attacker(handler), seconds=0.5) == SLOW


@pytest.mark.parametrize("headers", [[b"A: b"] * 10_000, [b"A: " + b"b" * 10**6], [b"A" * 10**6 + b": b"]])
def test_endless_headers_are_refused(headers: Sequence[bytes]) -> None:
    response = respond(b"HTTP/1.1 200 OK", *headers, b"Content-Type: image/png", body=b"pixels")
    assert refused(Attacker(response)) == FAILED


@pytest.mark.parametrize(
    "response",
    [
        respond(b"HTTP/1.1 200 OK", b"Content-Type: image/png", b"Content-Length: 100", body=b"pixels"),
        respond(b"HTTP/1.1 200 OK", b"Content-Type: image/png", b"Content-Length: 1", b"Content-Length: 2", body=b"pp"),
        respond(b"HTTP/1.1 200 OK", b"Content-Type: image/png", b"Content-Length: -1", body=b"pixels"),
        respond(b"HTTP/1.1 200 OK", b"Content-Type: image/png", b"Transfer-Encoding: chunked", body=b"-1\r\n"),
        respond(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: upgrade"),
        respond(b"SSH-2.0-OpenSSH"),
        respond(b"\0" * 100),
    ],
)
def test_what_is_not_http_is_refused(response: Handler) -> None:
    assert refused(Attacker(response)) == FAILED


def test_the_certificate_must_be_for_the_host_and_trusted() -> None:
    other = "other.example.com"
    attacker = Attacker(answering(b"pixels"))
    assert refused(attacker, f"https://{other}/a.png", domains=[other]) == FAILED
    assert refused(attacker, context=None) == FAILED
    assert not attacker.requests


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    attacker = Attacker(answering(b"pixels"))
    assert fetch(attacker) == b"pixels"
    assert attacker.connections == [(PUBLIC, 443, DOMAIN)]


def test_a_name_that_does_not_resolve() -> None:
    async def fail(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def run() -> None:
        await Fetcher([DOMAIN], max_bytes=1, seconds=5, resolve=fail).fetch(LINK)

    with pytest.raises(APIError) as raised:
        asyncio.run(run())
    assert raised.value.message == FAILED


def test_names_are_resolved_to_all_their_addresses() -> None:
    assert "127.0.0.1" in asyncio.run(resolve("localhost"))
