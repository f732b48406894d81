"""Limits: what is refused while the server is busy, and what happens when the engine fails."""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2
import openai
import pytest

import sparsight
from sparsight.server.app import create_app
from sparsight.server.engine_loop import EngineError, EngineLoop
from sparsight.server.images import ImageLoader
from sparsight.server.settings import Settings
from tests.engine.requests import Ask, break_once, engine, inputs_of, recipe_of
from tests.server.conftest import MODEL, RunningServer, asking
from tests.server.test_disconnect import wait_until


@pytest.fixture(scope="module")
def small():
    """A server that generates one answer at a time, and lets two requests wait."""
    settings = Settings(max_queue=2)
    loaded, processor = sparsight.load()
    small_engine = sparsight.Engine(loaded, processor, kv_memory=2**22, max_running=1)
    with RunningServer(create_app(small_engine, MODEL, settings, ImageLoader(settings))) as running:
        yield running


def test_a_full_queue_is_refused_at_once_and_what_was_accepted_is_answered(small, monkeypatch):
    """The engine stands still meanwhile: no check waits for a step."""
    resume, step = threading.Event(), small.service.engine.step

    def slow_step():
        resume.wait(30)
        return step()

    monkeypatch.setattr(small.service.engine, "step", slow_step)
    body = {"model": MODEL, "messages": asking()}
    with httpx2.Client(base_url=small.url, timeout=60) as client, ThreadPoolExecutor(12) as pool:
        sent = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(12)]
        refused = 0
        while refused < 10:
            refused = sum(each.done() for each in sent)
            assert client.get("/health").status_code == 200
        resume.set()
        responses = [each.result() for each in sent]
    assert sorted(each.status_code for each in responses) == [200] * 2 + [503] * 10
    for response in responses:
        if response.status_code == 200:
            assert response.json()["choices"][0]["message"]["content"] == "461"
        else:
            assert response.headers["retry-after"] == "1"
            error = response.json()["error"]
            assert error == {
                "message": "The server is busy: 2 requests are waiting.",
                "type": "server_error",
                "param": None,
                "code": "overloaded",
            }
    assert small.service.waiting == 0


def test_a_full_queue_is_refused_before_the_body_arrives_and_the_connection_stays(small, monkeypatch):
    monkeypatch.setattr(type(small.service), "waiting", 2)
    head = b"%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx2.URL(small.url).port), timeout=20) as client:
        client.sendall(head % (b"POST /v1/chat/completions", 100))
        response = b""
        while b"waiting" not in response:
            response += client.recv(2**16)
        assert response.startswith(b"HTTP/1.1 503")
        client.sendall(b"x" * 100 + head % (b"GET /health", 0))
        assert client.recv(2**16).startswith(b"HTTP/1.1 200")


def test_more_answers_than_can_run(small):
    with pytest.raises(openai.BadRequestError) as caught:
        small.client().chat.completions.create(model=MODEL, messages=asking(), n=2)
    assert caught.value.body["message"] == "n must be at most 1."


def test_more_memory_than_there_is(small):
    with pytest.raises(openai.BadRequestError) as caught:
        small.client().chat.completions.create(model=MODEL, messages=asking(), extra_body={"sparsight": {"budget": 1}})
    assert caught.value.code == "kv_memory_exceeded"
    answer = small.client().chat.completions.create(
        model=MODEL, messages=asking(), max_tokens=8, extra_body={"sparsight": {"budget": 1}}
    )
    assert answer.choices[0].message.content == "461"


@pytest.mark.parametrize("size", [1, 10**7])
def test_connections_beyond_the_limit_are_refused_at_once(size):
    """Those that are open keep their places, whether they send a request or not."""
    settings = Settings(max_connections=3)
    with RunningServer(create_app(engine(), MODEL, settings, ImageLoader(settings))) as running, ExitStack() as stack:
        address = running.url.removeprefix("http://").split(":")
        kept = stack.enter_context(httpx2.Client(base_url=running.url))
        assert kept.get("/health").status_code == 200
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(2)]
        with pytest.raises(openai.InternalServerError) as caught:
            running.client().completions.create(model=MODEL, prompt="x" * size)
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        assert caught.value.body["message"] == "The server is busy: 3 connections are open."
        assert caught.value.response.headers["retry-after"] == "1"
        assert kept.get("/health").status_code == 200
        idle[0].close()
        wait_until(lambda: httpx2.get(f"{running.url}/health").status_code == 200)


def test_openai_maps_503_to_its_exception(small, monkeypatch):
    monkeypatch.setattr(small.service, "draining", True)
    with pytest.raises(openai.InternalServerError) as caught:
        small.client().chat.completions.create(model=MODEL, messages=asking())
    assert caught.value.status_code == 503 and caught.value.code == "shutting_down"
    assert httpx2.get(f"{small.url}/ready").status_code == 503
    assert httpx2.get(f"{small.url}/health").status_code == 200


def test_an_error_of_the_model_ends_one_request(small, monkeypatch, caplog):
    broken = small.service.engine.model
    break_once(monkeypatch, broken, RuntimeError("secret /path"))
    client = small.client()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=asking())
    assert caught.value.body["message"] == "The model failed on the request."
    assert "secret /path" in caplog.text

    break_once(monkeypatch, broken, RuntimeError("secret /path"), lambda given: given["input_ids"].shape[1] == 1)
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model=MODEL, messages=asking(), stream=True))
    assert caught.value.message == "The model failed on the request."
    assert client.chat.completions.create(model=MODEL, messages=asking()).choices[0].message.content == "461"


def test_a_reader_of_complete_answers_is_woken_once():
    async def main():
        loop = EngineLoop(engine())
        params = sparsight.SamplingParams(max_new_tokens=8, ignore_eos=True)
        stream = loop.submit(inputs_of("llava", Ask()), recipe_of("llava", Ask()), params, False, "")
        stream.each_step = False
        loop.start()
        assert len([piece for piece in await stream.next() if piece.token is not None]) == 8
        assert await stream.next() == []
        loop.stop()

    asyncio.run(main())


def test_an_error_of_the_engine_ends_all_requests(monkeypatch, caplog):
    async def main():
        with engine() as failing:
            loop = EngineLoop(failing)
            monkeypatch.setattr(failing, "step", lambda: 1 / 0)
            params = sparsight.SamplingParams(max_new_tokens=4)
            streams = [
                loop.submit(inputs_of("llava", Ask()), recipe_of("llava", Ask()), params, False, "") for _ in "ab"
            ]
            loop.start()
            for stream in streams:
                with pytest.raises(EngineError):
                    await stream.next()
            assert loop.failed

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text
