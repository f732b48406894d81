"""An HTTPS server on this machine that plays a domain of the internet, and misbehaves as told."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from sparsight.server.fetch import Fetcher

DOMAIN = "images.example.com"
PUBLIC = "93.184.215.14"

Handler = Callable[[asyncio.StreamWriter], Awaitable[None]]


@cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS of a server whose certificate is for DOMAIN, and of a client that trusts it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with TemporaryDirectory() as folder:
        key, certificate = Path(folder, "key.pem"), Path(folder, "certificate.pem")
        new = [
            "openssl",
            "req",
            "-x509",
            "-nodes",
            "-days",
            "2",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
        ]
        names = ["-subj", "/CN=test", "-addext", f"subjectAltName=DNS:{DOMAIN}"]
        subprocess.run([*new, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
        server.load_cert_chain(certificate, key)
        return server, ssl.create_default_context(cafile=str(certificate))


def respond(*parts: bytes, body: bytes = b"") -> Handler:
    """A handler that sends a response of these lines."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(part + b"\r\n" for part in parts) + b"\r\n" + body)
        await writer.drain()

    return handler


def answering(content: bytes, content_type: bytes = b"image/png") -> Handler:
    length = str(len(content)).encode()
    return respond(b"HTTP/1.1 200 OK", b"Content-Type: " + content_type, b"Content-Length: " + length, body=content)


class Attacker:
    """The server, and a :class:`Fetcher` whose connections all end there.

    Attributes:
        requests: the heads of the requests that arrived.
        connections: the addresses that the fetcher connected to.
        lookups: the names that it looked up.
    """

    def __init__(self, handler: Handler, addresses: Sequence[Sequence[str]] = ((PUBLIC,),)) -> None:
        self.handler, self.addresses = handler, addresses
        self.requests: list[bytes] = []
        self.connections: list[tuple[str, int, str]] = []
        self.lookups: list[str] = []
        self.port = 0

    async def __aenter__(self) -> "Attacker":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=contexts()[0])
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def fetcher(self, domains: Sequence[str] = (DOMAIN,), **options: Any) -> Fetcher:
        defaults = {"max_bytes": 10_000, "seconds": 5.0, "context": contexts()[1]}
        return Fetcher(domains, resolve=self.resolve, connect=self.connect, **defaults | options)

    async def resolve(self, host: str) -> Sequence[str]:
        self.lookups.append(host)
        # Each lookup has the next answer, the last of them for ever.
        return self.addresses[min(len(self.lookups), len(self.addresses)) - 1]

    async def connect(self, address: str, port: int, **options: Any) -> Any:
        self.connections.append((address, port, options["server_hostname"]))
        return await asyncio.open_connection("127.0.0.1", self.port, **options)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            await self.handler(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
