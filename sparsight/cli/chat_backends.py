"""Who answers in ``sparsight chat``: a model in this process, or a server."""

import base64
import json
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError

from PIL import Image

from sparsight import methods
from sparsight.compression.recipe import Recipe
from sparsight.engine.engine import Engine
from sparsight.engine.sampling import SamplingParams
from sparsight.models.images import open_image
from sparsight.models.inputs import check_text
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.utils.text import first_sentence, mebibytes, printable

TIMEOUT = 300
"""Seconds without a byte from the server after which a request has failed."""

Conversation = Sequence[Mapping[str, Any]]


class Backend(Protocol):
    """Answers conversations.

    Attributes:
        report: what the KV cache kept for the last answer; empty before the first.
    """

    report: str

    def choose(self, method: str | None, budget: float | None) -> None:
        """Set how prompts are compressed from now on; None for the default. Raises ValueError."""

    def image(self, path: str) -> dict[str, Any]:
        """The part of a message that holds an image. Raises ImageError if it cannot be used."""

    def answer(self, messages: Conversation) -> Generator[str, None, None]:
        """The pieces of the next answer. Raises ValueError or RequestError if there is none."""


class LocalBackend:
    """A model in this process.

    Args:
        model: a folder or a hub id.
        device: where it runs.
        dtype: of its weights.
        max_new_tokens: the longest answer.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(self, model: str, device: str, dtype: str, max_new_tokens: int) -> None:
        self._checkpoint = load_checkpoint(model)
        loaded = load_model(self._checkpoint, device, dtype)
        self._engine = Engine(loaded, self._checkpoint.processor)
        self._params = SamplingParams.from_generation_config(loaded.generation_config, max_new_tokens=max_new_tokens)
        self._recipe = self._engine.recipe
        self.report = ""

    def choose(self, method: str | None, budget: float | None) -> None:
        """Set the recipe."""
        self._recipe = _recipe(method, budget)

    def image(self, path: str) -> dict[str, Any]:
        """The image itself."""
        return {"type": "image", "image": open_image(path)}

    def answer(self, messages: Conversation) -> Generator[str, None, None]:
        """Generate the next answer; closing the iterator ends it."""
        check_text(self._checkpoint, messages[-1]["content"][-1]["text"])
        handle = self._engine.add(messages=messages, recipe=self._recipe, params=self._params)
        try:
            for piece in handle:
                yield piece.text
        finally:
            self._engine.abort(handle)
            self._engine.step()
        self.report = str(handle.completions[0].report)


class ServerBackend:
    """A server.

    Args:
        url: its address, such as ``http://127.0.0.1:8000``.
        key: the API key, if it has one.
        max_new_tokens: the longest answer.

    Raises:
        ValueError: the server cannot be reached, or refuses the key.
    """

    def __init__(self, url: str, key: str | None, max_new_tokens: int) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise ValueError(f"The address of a server begins with http:// or https://, got {printable(url)}.")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._max_new_tokens = max_new_tokens
        models = b"".join(self._request("/v1/models"))
        try:
            self._model = json.loads(models)["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{printable(self._url)} has no model: it must be a server with OpenAI's API.") from error
        self._chosen: dict[str, Any] = {}
        self.report = ""

    def choose(self, method: str | None, budget: float | None) -> None:
        """Set what requests ask for; only names and numbers are checked here."""
        _recipe(method, budget)
        self._chosen = {key: each for key, each in (("method", method), ("budget", budget)) if each is not None}

    def image(self, path: str) -> dict[str, Any]:
        """The file as a data URL."""
        open_image(path)
        with Image.open(path) as image:
            kind = Image.MIME[image.format or ""]
        data = base64.b64encode(Path(path).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}

    def answer(self, messages: Conversation) -> Generator[str, None, None]:
        """Stream the next answer."""
        body = {"model": self._model, "messages": messages, "max_completion_tokens": self._max_new_tokens}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {"sparsight": self._chosen} if self._chosen else {}
        for line in self._request("/v1/chat/completions", json.dumps(body).encode()):
            name, _, data = line.strip().partition(b": ")
            if name == b"data" and data == b"[DONE]":
                return
            event = json.loads(data) if name == b"data" else {}
            if "error" in event:
                raise ValueError(str(event["error"]["message"]))
            for choice in event.get("choices", []):
                yield choice["delta"].get("content") or ""
            if event.get("usage"):
                self.report = _report(event["usage"])
        raise ValueError(f"The answer of {printable(self._url)} ended too early.")

    def _request(self, path: str, body: bytes | None = None) -> Iterator[bytes]:
        """The lines of a response."""
        request = urllib.request.Request(self._url + path, body, self._headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                yield from response
        except HTTPError as error:
            raise ValueError(_refusal(error)) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"Cannot reach {printable(self._url)}: {first_sentence(OSError(reason))}") from error


def _recipe(method: str | None, budget: float | None) -> Recipe:
    return methods.recipe(method or "sparsight", **({} if budget is None else {"budget": budget}))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address must not get the key."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse."""


def _refusal(error: HTTPError) -> str:
    """The sentence in an error's body."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return f"The server answered with status {error.code}."


def _report(usage: Mapping[str, Any]) -> str:
    """What a server's ``usage`` says about the KV cache, in the words of :class:`~sparsight.Report`."""
    cache, prompt = usage.get("sparsight"), usage["prompt_tokens"]
    if cache is None:
        return "The server says nothing about its cache."
    share = cache["kv_bytes"] / max(cache["full_kv_bytes"], 1)
    return (
        f"{cache['method']} at {cache['budget']:.1%}: {prompt} prompt tokens\n"
        f"{mebibytes(cache['kv_bytes'])} held of {mebibytes(cache['full_kv_bytes'])} ({share:.1%})"
    )
