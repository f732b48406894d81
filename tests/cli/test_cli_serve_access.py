"""``sparsight serve``: keys, domains for images, and limits from the command line."""

import base64
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
KEY = "the-key-of-the-only-client"

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--api-key-file", "nothing", "Cannot read the file with API keys, nothing."),
        ("--api-key-file", "/dev/null", "There is no API key in /dev/null: it has one per line."),
        (
            "--allow-image-urls",
            "*.example.com",
            "A domain must be like example.com, or .example.com with its subdomains, got '*.example.com'.",
        ),
    ],
)
def test_what_opens_a_door_must_be_well_formed(run: Run, option: str, value: str, sentence: str) -> None:
    assert run("serve", option, value) == (2, "", f"Error: {sentence}\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, and its port."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# The only client\n{KEY}\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--api-key-file", str(keys), "--max-image-pixels", "200000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsight", "serve", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "/v1/chat/completions" not in (line := process.stdout.readline()):
        assert line, "The server did not start."
    assert line.endswith(" -H 'Authorization: Bearer KEY'\n")
    yield process, port
    process.kill()
    process.wait()


def ask(port: int, image: Path, key: str | None = KEY) -> tuple[int, Any]:
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How much is JU?"}]
    body = json.dumps({"model": "sparsight-reader", "messages": [{"role": "user", "content": content}]})
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_keys_and_limits_come_from_the_options(server: tuple[Any, int], tmp_path: Path) -> None:
    _, port = server
    receipt, large = ROOT / "examples" / "receipt-1.png", tmp_path / "large.png"
    Image.new("L", (500, 500)).save(large)
    status, answer = ask(port, receipt)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "461")
    assert ask(port, receipt, key=None)[0] == 401
    status, error = ask(port, large)
    assert (status, error["error"]["message"]) == (400, "An image may have at most 200,000 pixels.")


def test_the_processes_that_decode_images_end_with_a_server_that_is_killed(server: tuple[Any, int]) -> None:
    process, port = server
    ask(port, ROOT / "examples" / "receipt-1.png")
    workers = psutil.Process(process.pid).children()
    assert workers
    process.kill()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert len(gone) == len(workers) and not alive
