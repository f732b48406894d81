"""Fetching images from the few domains that the operator has named."""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network

import anyio
import h11

from sparsight.server.errors import APIError
from sparsight.server.image_pool import refusal

FETCHES = 8
"""Links that are fetched at the same time."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = rf"(?:{_LABEL}\.)+[a-z][a-z0-9-]{{0,61}}[a-z0-9]"
"""A domain in ASCII; its last part begins with a letter, which no spelling of an IPv4 address does."""
_DOMAIN = re.compile(rf"\.?{_HOST}")
_LINK = re.compile(rf"https://({_HOST})(/[a-z0-9._~!$&'()*+,;=:@/?%-]*)?", re.IGNORECASE | re.ASCII)
"""A link without a port, a user and a fragment, in the characters of RFC 3986."""

MAX_LINK = 4096

_UNICAST = IPv6Network("2000::/3")
# 6to4, Teredo, documentation, and protocols; not every version of Python counts all of them as special.
_SPECIAL = tuple(map(ip_network, ("2002::/16", "2001::/32", "3fff::/20", "192.88.99.0/24", "192.0.0.0/24")))

Resolve = Callable[[str], Awaitable[Sequence[str]]]
Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def check_domain(domain: str) -> str:
    """A domain as :class:`Fetcher` takes it.

    Raises:
        ValueError: it is not ``example.com`` or ``.example.com``.
    """
    if not _DOMAIN.fullmatch(domain):
        raise ValueError(f"A domain must be like example.com, or .example.com with its subdomains, got {domain!r}.")
    return domain


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; IPv6 addresses that stand for IPv4 ones do not."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip not in _UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL)


async def resolve(host: str) -> list[str]:
    """The IP addresses of a host."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


class Fetcher:
    """Fetches images over HTTPS, without redirects and proxies.

    A name is resolved once, all its addresses must be public, and the connection goes to the first of them, with TLS
    verified for the name.

    Args:
        domains: domains that images may come from; ``.example.com`` stands for example.com and its subdomains.
        max_bytes: largest response body, checked while it is read.
        seconds: time for everything: name, connection and response.
        resolve: finds the addresses of a host.
        connect: opens a connection as :func:`asyncio.open_connection` does.
        context: whom TLS trusts; the system's certificate authorities if None.
    """

    def __init__(
        self,
        domains: Sequence[str],
        *,
        max_bytes: int,
        seconds: float,
        resolve: Resolve = resolve,
        connect: Connect = asyncio.open_connection,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.domains = [check_domain(domain) for domain in domains]
        self.max_bytes, self.seconds = max_bytes, seconds
        self._resolve, self._connect = resolve, connect
        self._context = context or ssl.create_default_context()
        self._places = asyncio.Semaphore(FETCHES)

    async def fetch(self, link: str) -> bytes:
        """The content of a link.

        Raises:
            APIError: the link is refused, or what it leads to is.
        """
        match = _LINK.fullmatch(link) if len(link) <= MAX_LINK else None
        if not match:
            raise refusal(
                f"A link to an image must be like https://example.com/a.png, with {MAX_LINK:,} characters at most."
            )
        host = match[1].lower()
        if not any(f".{host}".endswith(each) if each[0] == "." else host == each for each in self.domains):
            raise refusal("Images from this domain are not allowed.")
        try:
            with anyio.fail_after(self.seconds):
                async with self._places:
                    return await self._get(host, match[2] or "/")
        except TimeoutError as error:
            raise refusal("An image took too long to fetch.") from error
        except (OSError, ValueError, h11.RemoteProtocolError) as error:
            raise _failed() from error

    async def _get(self, host: str, target: str) -> bytes:
        addresses = await self._resolve(host)
        if not addresses or not all(map(is_public, addresses)):
            raise _failed()
        reader, writer = await self._connect(addresses[0], 443, ssl=self._context, server_hostname=host)
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [("Host", host), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
            request = h11.Request(method="GET", target=target, headers=headers)
            writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
            body = bytearray()
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(2**14))
                elif isinstance(event, h11.Response):
                    self._check(event)
                elif isinstance(event, h11.Data):
                    body += event.data
                    self._check_size(len(body))
            return bytes(body)
        finally:
            # Nothing is left to say, and closing in order would wait for the other side.
            writer.transport.abort()

    def _check(self, response: h11.Response) -> None:
        headers = dict(response.headers)
        if 300 <= response.status_code < 400:
            raise refusal("A link to an image leads to a redirect, which is not followed.")
        if response.status_code != 200:
            raise _failed()
        if not headers.get(b"content-type", b"").lower().startswith(b"image/"):
            raise refusal("A link to an image leads to something else.")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise _failed()
        self._check_size(int(headers.get(b"content-length", b"0")))

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise refusal(f"An image may have at most {self.max_bytes:,} bytes.")


def _failed() -> APIError:
    return refusal("An image could not be fetched.")
