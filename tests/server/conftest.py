"""A server that really runs: the shipped model on a free port, in a thread of its own."""

import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

import sparsight
from sparsight.server.app import create_app
from sparsight.server.images import ImageLoader
from sparsight.server.run import bind, server_config
from sparsight.server.settings import Settings

ROOT = Path(__file__).parents[2]
MODEL = "sparsight-reader"
RECEIPT = ROOT / "examples" / "receipt-1.png"
QUESTION = "How much is JU?"


def data_url(path: Path = RECEIPT) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def asking(text: str = QUESTION, url: str | None = None) -> list[dict[str, Any]]:
    """The messages of a question about the receipt."""
    image = {"type": "image_url", "image_url": {"url": url or data_url()}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


class RunningServer:
    """An application under uvicorn on a free port."""

    def __init__(self, app: Any) -> None:
        self.service = app.state.service
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(server_config(app))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> "RunningServer":
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "max_retries": 0,
            "_strict_response_validation": True,
        }
        return openai.OpenAI(**(settings | options))


def image_loader() -> ImageLoader:
    return ImageLoader(Settings())


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    model, processor = sparsight.load()
    engine = sparsight.Engine(model, processor, kv_memory=2**28)
    with RunningServer(create_app(engine, MODEL, Settings(), image_loader(), loopback=True)) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()
