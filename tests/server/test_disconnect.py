"""A client that goes gives its place in the engine back, whether its answer is streamed or not."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random

import httpx2
import pytest

from tests.server.conftest import MODEL, asking

LONG = {"model": MODEL, "messages": asking(), "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture
def steps_after_abort(server, monkeypatch):
    """Steps that the engine needed to end each request that was aborted."""
    engine, counts = server.service.engine, {}
    abort, step = engine.abort, engine.step

    def counted_abort(handle):
        counts[handle] = 0
        abort(handle)

    def counted_step():
        pending = [handle for handle in counts if not handle.done]
        busy = step()
        for handle in pending:
            counts[handle] += 1
        return busy

    monkeypatch.setattr(engine, "abort", counted_abort)
    monkeypatch.setattr(engine, "step", counted_step)
    return counts


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_idle(server, counts):
    service = server.service
    wait_until(lambda: not service.active and not service.engine.busy)
    ((handle, count),) = counts.items()
    assert handle.done and count <= 2
    assert all(each.finish_reason == "aborted" for each in handle.completions)
    assert service.engine.stats.kv_bytes == 0


@pytest.mark.parametrize("read", [0, 1, 5])
def test_streaming(server, steps_after_abort, read):
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        for _ in range(read):
            next(lines)
    check_idle(server, steps_after_abort)


def test_not_streaming(server, steps_after_abort):
    def send():
        with httpx2.Client() as client, pytest.raises(httpx2.ReadTimeout):
            client.post(f"{server.url}/v1/chat/completions", json=LONG, timeout=httpx2.Timeout(10, read=1))

    def counted():
        return server.service.metrics.generation_tokens.collect()[0].samples[0].value

    before = counted()
    sender = threading.Thread(target=send)
    sender.start()
    wait_until(lambda: server.service.engine.running)
    sender.join()
    check_idle(server, steps_after_abort)
    (handle,) = steps_after_abort
    wait_until(lambda: len(handle.completions[0].tokens) - 2 <= counted() - before <= len(handle.completions[0].tokens))


def test_before_the_answer_begins(server, monkeypatch):
    """While the images are opened nothing has reached the engine."""
    gone, started = [], threading.Event()

    async def load(url):
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            gone.append(url)

    monkeypatch.setattr(server.service.images, "load", load)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{server.url}/v1/chat/completions", json=LONG, timeout=httpx2.Timeout(10, read=0.5))
    assert started.is_set()
    wait_until(lambda: not server.service.active)
    assert len(gone) == 1 and not server.service.engine.busy


def test_half_a_request(server):
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
    wait_until(lambda: not server.service.active)
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_many_clients_of_which_some_go(server):
    """All that stay get the right answer, and nothing is held in the end."""
    questions = ["How much is JU?", "How much is KM?", "Read the list."]
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        path = "/v1/chat/completions"
        bodies = {text: {"model": MODEL, "messages": asking(text), "max_tokens": 60} for text in questions}
        expected = {
            text: client.post(path, json=body).json()["choices"][0]["message"]["content"]
            for text, body in bodies.items()
        }
        assert expected["How much is JU?"] == "461"
        random = Random(7)
        chosen = [(random.choice(questions), random.random() < 0.2, random.random()) for _ in range(60)]

        def send(text, goes, patience):
            if not goes:
                return client.post(path, json=bodies[text]).json()["choices"][0]["message"]["content"]
            with suppress(httpx2.ReadTimeout):
                client.post(path, json=bodies[text], timeout=httpx2.Timeout(60, read=patience))
            return None

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda each: send(*each), chosen))
    for (text, goes, _), answer in zip(chosen, answers, strict=True):
        assert goes or answer == expected[text]
    wait_until(lambda: not server.service.active and not server.service.engine.busy)
    assert server.service.engine.stats.kv_bytes == 0
