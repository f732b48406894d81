"""Running the application, and stopping it so that requests that have begun are answered."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from sparsight.server.protocol import limited_protocol
from sparsight.server.service import Service

KEEP_ALIVE_SECONDS = 5
SWITCH_SECONDS = 0.0005
"""After which Python lets another thread run, ten times as often as by default."""

LAST_SECONDS = 5
"""Time that responses have to be sent once nothing is generated any more."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet.

    Raises:
        ValueError: the address cannot be used.
    """
    # asyncio turns off Nagle's algorithm only where the protocol is given. With it, a response's body waits 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Cannot listen on {host} port {port}: {reason}.") from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can connect to a socket."""
    return ip_address(bound.getsockname()[0]).is_loopback


def run(app: FastAPI, bound: socket.socket, started: Callable[[], Any]) -> None:
    """Serve an application until SIGINT or SIGTERM.

    After the signal new requests get 503; the process goes on until those that have begun are answered, or the
    setting ``drain_seconds`` is over. A second signal ends the process at once.

    Args:
        app: the application.
        bound: the socket to listen on.
        started: called when requests can be sent.
    """
    # The event loop need not wait long while the engine's thread runs Python.
    sys.setswitchinterval(SWITCH_SECONDS)
    _Server(server_config(app), app.state.service, started).run([bound])


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves an application."""
    settings = app.state.service.settings
    return uvicorn.Config(
        app,
        http=limited_protocol(settings.header_seconds, settings.send_seconds, settings.max_connections),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )


class _Server(uvicorn.Server):
    """Drains before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], Any]) -> None:
        super().__init__(config)
        self._service, self._on_start = service, started
        self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            os._exit(128 + signal.SIGINT)
        self._service.draining = True
        self._deadline = time.monotonic() + self._service.settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        stops = await super().on_tick(counter)
        if not self._service.draining or stops:
            return stops
        if self._service.active and time.monotonic() < self._deadline:
            return False
        for generation in tuple(self._service.active):
            generation.abort()
        return True
