"""The command as a process: it starts, drains and stops."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from sparsight.server.run import bind
from tests.server.conftest import MODEL, asking

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process that has printed its URL."""
    command = [sys.executable, "-m", "sparsight", "serve", "--port", "0", *options]
    with subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            url = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())[0]
            yield process, url
        finally:
            process.kill()


class Streams:
    """Requests whose streams are read at the same time."""

    def __init__(self, url: str, count: int, tokens: int) -> None:
        self.started = threading.Semaphore(0)
        self.lines: list[list[str]] = [[] for _ in range(count)]
        body = {"model": MODEL, "messages": asking(), "stream": True, "max_tokens": tokens, "ignore_eos": True}
        self._threads = [threading.Thread(target=self._read, args=(url, body, lines)) for lines in self.lines]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self.started.acquire(timeout=60)

    def _read(self, url: str, body: dict, lines: list[str]) -> None:
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            for line in filter(None, response.iter_lines()):
                lines.append(line)
                if len(lines) == 3:
                    self.started.release()

    def finish(self) -> None:
        for thread in self._threads:
            thread.join()


def test_running_requests_are_answered_after_a_signal_and_new_ones_refused():
    with serving() as (process, url):
        streams = Streams(url, 4, 150)
        process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{url}/ready").status_code == 200:
            pass
        response = httpx2.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": asking()})
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "shutting_down"
        assert httpx2.get(f"{url}/health").status_code == 200
        streams.finish()
        assert process.wait(timeout=30) == 0
    for lines in streams.lines:
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_requests_that_take_too_long_end_with_an_error():
    with serving("--drain-seconds", "0.2") as (process, url):
        streams = Streams(url, 2, 1000)
        process.send_signal(signal.SIGINT)
        streams.finish()
        assert process.wait(timeout=30) == 0
    for lines in streams.lines:
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_second_signal_ends_the_process_at_once():
    with serving() as (process, url):
        body = {"model": MODEL, "messages": asking(), "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while httpx2.get(f"{url}/ready").status_code == 200:
                pass
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx2.RemoteProtocolError):
                list(lines)
        assert process.wait(timeout=10) == 130


def test_responses_do_not_wait_for_acknowledgements():
    """Nagle's algorithm would hold back a body until the client has acknowledged the headers, up to 40 ms later."""

    async def main():
        accepted = asyncio.Queue()
        bound = bind("127.0.0.1", 0)
        async with await asyncio.start_server(lambda _, writer: accepted.put_nowait(writer), sock=bound):
            _, client = await asyncio.open_connection(*bound.getsockname())
            writer = await accepted.get()
            assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            client.close()
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use(host):
    with bind(host, 0) as first:
        first.listen()
        with pytest.raises(ValueError, match=r"Cannot listen on .* port \d+: Address already in use\."):
            bind(host, first.getsockname()[1])


def test_no_such_address():
    with pytest.raises(ValueError, match=r"Cannot listen on host\.invalid port 80"):
        bind("host.invalid", 80)
