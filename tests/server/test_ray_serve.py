"""The server on a real Ray of two replicas: what clients get, also when a replica is killed."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from sparsight.server.settings import Settings
from tests.server.conftest import MODEL, asking
from tests.server.test_run import ENVIRONMENT, serving

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from sparsight.server.ray_serve import TRIES, Ingress

KEY = "correct-horse-battery"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PATH = "/v1/chat/completions"
RUNNING = "sparsight:num_requests_running"
LONG = {"model": MODEL, "messages": asking(), "max_tokens": 300, "ignore_eos": True}


class Replicas:
    """A handle of replicas that answer with given messages, or fail."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers, self.requests = list(answers), []

    def options(self, **_: Any) -> "Replicas":
        return self

    async def remote(self, request: Any, body: bytes) -> Any:
        self.requests.append((request["path"], request["state"]["request_id"], body))
        for each in self.answers.pop(0):
            if isinstance(each, Exception):
                raise each
            yield each


def head(kind: bytes) -> dict[str, Any]:
    headers = [(b"content-type", kind), (b"x-request-id", b"2")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def forwarded(replicas: Replicas) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of a response."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "scheme": "http", "http_version": "1.1", "path": PATH, "raw_path": b""}
    scope |= {"query_string": b"", "headers": [(b"x-request-id", b"1"), (b"host", b"localhost")]}
    asyncio.run(Ingress(replicas, Settings(), (), True).__serve_build_asgi_app__()(scope, receive, send))
    assert [each["type"] for each in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    assert [each.get("more_body", False) for each in sent[1:]] == [True] * (len(sent) - 2) + [False]
    return sent[0]["status"], sent[0]["headers"], b"".join(each["body"] for each in sent[1:])


ANSWER = [[head(b"application/json"), body(b"answer")]]


def test_a_request_whose_replica_dies_is_given_to_another_one() -> None:
    replicas = Replicas([ActorDiedError()], [ActorDiedError()], ANSWER)
    assert forwarded(replicas) == (200, [(b"content-type", b"application/json")], b"answer")
    assert replicas.requests == [(PATH, "1", b"{}")] * 3


def test_a_request_that_every_replica_dies_of_is_given_up() -> None:
    replicas = Replicas(*[[ActorDiedError()]] * 10)
    status, headers, data = forwarded(replicas)
    assert (status, dict(headers)[b"retry-after"], len(replicas.requests)) == (503, b"1", TRIES)
    assert json.loads(data)["error"]["code"] == "replica_lost"


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    replicas = Replicas([[head(b"text/event-stream"), body(b"data: {}\n\n", more=True)], ActorDiedError()], ANSWER)
    status, _, data = forwarded(replicas)
    first, error, done, rest = data.decode().split("\n\n")
    assert (status, first, done, rest) == (200, "data: {}", "data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(replicas.requests) == 1


def test_a_replica_that_dies_after_the_response_is_not_missed() -> None:
    assert forwarded(Replicas([*ANSWER, ActorDiedError()]))[2] == b"answer"


def test_requests_that_no_replica_has_a_place_for_are_refused() -> None:
    status, headers, data = forwarded(Replicas([BackPressureError(1, 1)]))
    assert (status, dict(headers)[b"retry-after"]) == (503, b"1")
    assert json.loads(data)["error"]["code"] == "overloaded"


Server = tuple["subprocess.Popen[str]", str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys: Path = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with serving("--ray", "local", "--replicas", "2", "--api-key-file", str(keys)) as running:
        yield running


def replicas(server: Server) -> set[psutil.Process]:
    """The processes that hold a model."""
    children = psutil.Process(server[0].pid).children(recursive=True)
    return {each for each in children if "sparsight:replica" in " ".join(each.cmdline())}


def post(server: Server, **fields: Any) -> httpx2.Response:
    return httpx2.post(server[1] + PATH, json=LONG | fields, headers=HEADERS, timeout=600)


def content(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


class Stream(threading.Thread):
    """A request whose stream is read in a thread."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.url, self.lines, self.begun = server[1] + PATH, [], threading.Event()
        self.start()

    def run(self) -> None:
        with httpx2.stream("POST", self.url, json=LONG | {"stream": True}, headers=HEADERS, timeout=600) as response:
            for line in filter(None, response.iter_lines()):
                self.lines.append(line)
                if len(self.lines) == 3:
                    self.begun.set()

    @property
    def last(self) -> dict[str, Any]:
        """The last event."""
        assert self.lines[-1] == "data: [DONE]"
        return json.loads(self.lines[-2].removeprefix("data: "))


def test_clients_get_what_they_get_without_ray(server: Server) -> None:
    settings: dict[str, Any] = {"max_retries": 0, "_strict_response_validation": True, "timeout": 600}
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key=KEY, **settings) as client:
        answer = client.chat.completions.create(model=MODEL, messages=asking(), n=2)
        assert [each.message.content for each in answer.choices] == ["461"] * 2
        assert answer.usage.prompt_tokens == 587
        chunks = client.chat.completions.create(model=MODEL, messages=asking(), stream=True)
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == "461"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=asking(), n=100)
        assert caught.value.param == "n"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server[1]}/v1", api_key="wrong", **settings).models.list()
    response = httpx2.post(server[1] + PATH, content=bytes(2**24 + 1), headers=HEADERS)
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"
    response = httpx2.get(f"{server[1]}/ready", headers=HEADERS)
    assert response.status_code == 200 and len(response.headers.get_list("x-request-id")) == 1


def metric(server: Server, name: str) -> float:
    """The sum of a metric over the replicas; a scrape is of one that Ray chooses."""
    values = {}
    with httpx2.Client(headers=HEADERS) as client:
        for _ in range(16):
            lines = client.get(f"{server[1]}/metrics").text.splitlines()
            found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            values[found["process_start_time_seconds"]] = float(found.get(name, 0))
    return sum(values.values())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_request(server: Server, stream: bool) -> None:
    aborted = 'sparsight:request_success_total{finished_reason="aborted"}'
    before, end = metric(server, aborted), time.monotonic() + 60
    data = json.dumps(LONG | {"stream": stream, "max_tokens": 3000}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(server[1].removeprefix("http://").split(":")) as connection:
        connection.sendall(head.encode() + data)
        while not metric(server, RUNNING):
            assert time.monotonic() < end, "The request does not run."
    while metric(server, RUNNING):
        assert time.monotonic() < end, "The request has not ended."
    assert metric(server, aborted) == before + 1


def test_no_request_is_lost_when_a_replica_is_killed(server: Server) -> None:
    expected = content(post(server))
    both = replicas(server)
    assert len(both) == 2
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(post, server) for _ in range(12)]
        streams = [Stream(server) for _ in range(6)]
        for each in streams:
            assert each.begun.wait(300)
        assert not any(each.done() for each in waiting)
        killed = min(both, key=lambda each: each.pid)
        killed.kill()
        assert [content(each.result()) for each in waiting] == [expected] * 12
    for stream in streams:
        stream.join()
    lost = [each for each in streams if "error" in each.last]
    assert 0 < len(lost) < len(streams)
    for stream in lost:
        assert stream.last["error"]["code"] == "replica_lost"
    for stream in set(streams) - set(lost):
        assert stream.last["choices"][0]["finish_reason"] == "length"
    while len(replicas(server) - {killed}) < 2:
        time.sleep(0.1)


def test_running_requests_are_answered_after_a_signal_and_new_ones_refused(server: Server) -> None:
    stream = Stream(server)
    assert stream.begun.wait(300)
    server[0].send_signal(signal.SIGTERM)
    while httpx2.get(f"{server[1]}/ready", headers=HEADERS).status_code == 200:
        pass
    response = post(server)
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "shutting_down"
    stream.join()
    assert stream.last["choices"][0]["finish_reason"] == "length"
    assert server[0].wait(timeout=300) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2"], "--replicas and --max-replicas are for --ray, which is not given."),
        (
            ["--ray", "local", "--replicas", "2", "--max-replicas", "1"],
            "--max-replicas must be at least --replicas, 2.",
        ),
        (["--ray", "local", "--prefix-dir", "x"], "--prefix-dir is for one process, not for --ray."),
        (["--ray", "local", "--max-connections", "9"], "--max-connections is not for --ray"),
        (["--ray", "auto"], "There is no Ray cluster at 'auto'; local starts one."),
        (["--ray", "local", "--device", "banana"], "Error: A replica cannot start: There is no device 'banana'"),
    ],
)
def test_what_cannot_be_served(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "sparsight", "serve", "--port", "0", *options]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert (process.returncode, process.stdout) == (2, "")
    assert message in process.stderr.splitlines()[-1]
