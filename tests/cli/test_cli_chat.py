"""`sparsight chat`, whose questions and commands come from standard input."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sparsight.cli import chat

EXAMPLES = Path(__file__).parents[2] / "examples"
RECEIPT = EXAMPLES / "receipt-1.png"
USAGE = {"method": "snapkv", "budget": 0.5, "kv_bytes": 2**20, "full_kv_bytes": 2**22}


@pytest.fixture
def talk(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Chat with these lines as standard input; returns the exit code and the lines of both outputs."""

    def call(lines: list[str], *arguments: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        code, out, err = run("chat", *arguments)
        return code, out.splitlines(), err.splitlines()

    return call


class Server(ThreadingHTTPServer):
    """Answers as a script says, and keeps what it was sent."""

    def __init__(self, script: list[tuple[int, list[Any]]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.bodies, self.keys = iter(script), [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self.reply(200, [{"data": [{"id": "small"}]}], "")

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, events = next(self.server.script)
        self.reply(status, events, "data: " if status == 200 else "")

    def reply(self, status: int, events: list[Any], prefix: str) -> None:
        self.send_response(status)
        if status == 307:
            self.send_header("Location", self.server.url + "/elsewhere")
        self.end_headers()
        for event in events:
            self.wfile.write(f"{prefix}{event if isinstance(event, str) else json.dumps(event)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[list[Any]], Server]]:
    started: list[Server] = []

    def start(script: list[Any]) -> Server:
        server = Server(script)
        started.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def pieces(*texts: str, usage: bool = True) -> list[Any]:
    chunks: list[Any] = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    last = {"choices": [], "usage": {"prompt_tokens": 600, "sparsight": USAGE}}
    return [{"choices": [{"delta": {"role": "assistant"}}]}, *chunks, *([last] if usage else []), "[DONE]"]


def test_turns_share_a_conversation_and_reset_forgets_it(talk: Callable[..., Any]) -> None:
    question = "How much is JU?"
    code, out, err = talk(["/report", f"/image {RECEIPT}", question, "How much is JO?", "/reset", question, "/report"])
    assert (code, err) == (0, [])
    assert out[0] == "There is no answer yet."
    expected = {each["question"]: each["answer"] for each in json.loads((EXAMPLES / "questions.json").read_text())}
    assert out[1] == expected[question]
    assert out[3] != out[1], "without the image"
    assert out[4].startswith("sparsight at 10.0%: ") and out[4].endswith(" prompt tokens, 0 of them vision")


def test_a_method_and_a_budget_hold_until_they_are_changed(talk: Callable[..., Any]) -> None:
    lines = ["Hi", "/report", "/budget 0.5", "Hi", "/report", "/method h2o", "Hi", "/report"]
    code, out, _ = talk(lines, "--method", "snapkv", "--budget", 0.2, "--max-new-tokens", 1)
    assert code == 0
    names = [line.split(":")[0] for line in out if "prompt tokens" in line]
    assert names == ["snapkv at 20.0%", "snapkv at 50.0%", "h2o at 10.0%"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/image missing.png", "Cannot read missing.png: No such file or directory."),
        ("/method snapvk", "Unknown method 'snapvk': did you mean 'snapkv'?"),
        ("/budget 2", "budget must be a number in (0, 1], got 2.0."),
        ("/budget half", "The budget must be a number such as 0.1, got 'half'."),
        ("/budget", "/budget needs a value; /help shows how."),
        ("/imagine", "There is no command /imagine; /help lists them."),
        ("a </s> b", "The prompt must not spell '</s>'"),
        ("word " * 5000, "The prompt has "),
    ],
)
def test_an_error_is_one_sentence_and_the_chat_goes_on(talk: Callable[..., Any], line: str, sentence: str) -> None:
    code, out, err = talk([f"/image {RECEIPT}", line, "How much is JU?", "/quit", "ignored"])
    assert (code, out) == (1, ["461"])
    assert len(err) == 1 and err[0].startswith(sentence)


def test_a_stopped_answer_leaves_the_conversation_as_it_was(
    talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stops:
        report = ""

        def choose(self, method: str | None, budget: float | None) -> None:
            pass

        def answer(self, messages: Any) -> Iterator[str]:
            yield "4"
            raise KeyboardInterrupt

    talking = chat.Chat(Stops(), None, None)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        talking.take("How much is JU?")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    talking.take("How much is JU?")
    assert talking.messages == []
    assert capsys.readouterr().err == "Stopped; the question and its answer are not part of the conversation.\n"


def test_a_server_gets_the_conversation_and_the_key(
    talk: Callable[..., Any], serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve([(200, pieces("46", "1")), (200, pieces("332"))])
    (tmp_path / "key").write_text("# of the server\nsecret\n")
    lines = [f"/image {RECEIPT}", "How much is JU?", "/method snapkv", "How much is JO?", "/report"]
    code, out, err = talk(lines, "--url", server.url + "/v1/", "--api-key-file", tmp_path / "key")
    assert (code, err) == (0, [])
    report = ["snapkv at 50.0%: 600 prompt tokens", "1.00 MiB held of 4.00 MiB (25.0%)"]
    assert out == ["461", "332", *report]
    assert server.keys == ["Bearer secret"]
    first, second = server.bodies
    assert (first["model"], first["stream"], first["max_completion_tokens"]) == ("small", True, 500)
    assert "sparsight" not in first and second["sparsight"] == {"method": "snapkv"}
    image, text = first["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": "How much is JU?"}
    assert second["messages"][0] == first["messages"][0]
    assert second["messages"][1:] == [
        {"role": "assistant", "content": [{"type": "text", "text": "461"}]},
        {"role": "user", "content": [{"type": "text", "text": "How much is JO?"}]},
    ]


def test_errors_of_a_server_are_one_sentence_each(talk: Callable[..., Any], serve: Callable[..., Server]) -> None:
    refusal = {"error": {"message": "The queue is full.\x1b[2J"}}
    server = serve(
        [(503, [refusal]), (500, ["<html>"]), (200, [refusal]), (200, ["{}"]), (307, []), (200, pieces("ok"))]
    )
    code, out, err = talk(["Hi"] * 6, "--url", server.url)
    assert (code, out) == (1, ["ok"])
    assert err == [
        "The queue is full.\\x1b[2J",
        "The server answered with status 500.",
        "The queue is full.\\x1b[2J",
        f"The answer of {server.url} ended too early.",
        "The server answered with status 307.",
    ]
    assert all(len(body["messages"]) == 1 for body in server.bodies)


def test_what_is_not_a_server_of_the_api_is_refused(run: Callable[..., Any]) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": []}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        code, out, err = run("chat", "--url", url)
        server.shutdown()
    assert (code, out) == (2, "")
    assert err == f"Error: {url} has no model: it must be a server with OpenAI's API.\n"


def test_a_server_that_is_not_there_ends_the_chat_in_one_sentence(run: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, sentence in [
        (("--url", "http://127.0.0.1:1"), "Cannot reach http://127.0.0.1:1: [Errno 111] Connection refused."),
        (("--url", "127.0.0.1"), "The address of a server begins with http:// or https://, got 127.0.0.1."),
        (("--api-key-file", tmp_path), "--api-key-file is for --url, which is not given."),
        (("--url", "http://127.0.0.1:1", "--model", "x"), "--model and --url exclude each other"),
        (("--url", "http://127.0.0.1:1", "--api-key-file", tmp_path), "Cannot read the API key from "),
    ]:
        code, out, err = run("chat", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"Error: {sentence}") and len(err.splitlines()) == 1
