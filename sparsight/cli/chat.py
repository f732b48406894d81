"""``sparsight chat``: a conversation about images in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from sparsight.cli import options
from sparsight.cli.terminal import console, show
from sparsight.utils.text import escape, printable, quoted

if TYPE_CHECKING:
    from sparsight.cli.chat_backends import Backend

HELP = """\
/image PATH     add an image to the next question
/method NAME    compress with another method, at its own budget
/budget 0.1     keep this share of the KV entries
/report         show what the KV cache kept for the last answer
/reset          start a new conversation
/help           show this list
/quit           leave"""


def main(
    image: options.Images = None,
    url: Annotated[
        str | None, typer.Option(help="Talk to this server instead of a model in this process.", metavar="URL")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File whose first key is the server's API key.", metavar="FILE")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 500,
    method: Annotated[
        str | None,
        typer.Option(
            help="Compression method; by default sparsight, or the server's own.",
            metavar="NAME",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    budget: options.Budget = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Chat about images with a model, here or on a server; /help lists the commands.

    Questions that are piped in are answered line by line, and the exit code is 1 if one of them has no answer.
    """
    from sparsight.cli.chat_backends import LocalBackend, ServerBackend

    backend: Backend
    if url is None:
        if api_key_file is not None:
            raise ValueError("--api-key-file is for --url, which is not given.")
        backend = LocalBackend(model, device, dtype, max_new_tokens)
    else:
        if model != options.DEFAULT_MODEL:
            raise ValueError("--model and --url exclude each other: the server has its model.")
        key = None if api_key_file is None else _read_key(api_key_file)
        backend = ServerBackend(url, key, max_new_tokens)
    chat = Chat(backend, method, budget)
    for path in image or []:
        chat.add_image(path)
    for line in _lines():
        if line == "/quit":
            break
        chat.take(line)
    if chat.failed and not sys.stdin.isatty():
        raise typer.Exit(1)


class Chat:
    """One conversation.

    Args:
        backend: who answers.
        method: compression method, None for the backend's default.
        budget: share of the KV entries to keep, None for the method's own.

    Attributes:
        failed: whether a command or a question has failed.

    Raises:
        ValueError: there is no such method or budget.
    """

    def __init__(self, backend: Backend, method: str | None, budget: float | None) -> None:
        self.backend, self.method, self.budget = backend, method, budget
        self.backend.choose(method, budget)
        self.messages: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.failed = False

    def take(self, line: str) -> None:
        """Run a command or answer a question; an error is shown, and the conversation stays as it was."""
        from sparsight.engine.request import RequestError

        try:
            if line.startswith("/"):
                self._command(*line[1:].partition(" ")[::2])
            elif line:
                self._ask(line)
        except (ValueError, RequestError) as error:
            self.failed = True
            console(stderr=True).print(Text(escape(error), "red"), soft_wrap=True)

    def add_image(self, path: str) -> None:
        """Add an image to the next question. Raises ImageError if it cannot be used."""
        self.images.append(self.backend.image(path))

    def _command(self, name: str, value: str) -> None:
        value = value.strip()
        if name == "image" and value:
            self.add_image(str(Path(value).expanduser()))
        elif name == "method" and value:
            self._choose(value, None)
        elif name == "budget" and value:
            self._choose(self.method, _number(value))
        elif name == "report":
            show(self.backend.report or "There is no answer yet.")
        elif name == "reset":
            self.messages, self.images = [], []
        elif name == "help":
            show(HELP)
        elif name in ("image", "method", "budget"):
            raise ValueError(f"/{name} needs a value; /help shows how.")
        else:
            raise ValueError(f"There is no command /{printable(name)}; /help lists them.")

    def _choose(self, method: str | None, budget: float | None) -> None:
        self.backend.choose(method, budget)
        self.method, self.budget = method, budget

    def _ask(self, question: str) -> None:
        asked = {"role": "user", "content": [*self.images, {"type": "text", "text": question}]}
        text = ""
        try:
            with closing(self.backend.answer([*self.messages, asked])) as pieces:
                with console(stderr=True).status("Reading"):
                    first = next(pieces, "")
                for piece in chain([first], pieces):
                    text += piece
                    print(escape(piece, keep="\n\t"), end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            raise ValueError("Stopped; the question and its answer are not part of the conversation.") from None
        finally:
            if text:
                print()
        self.messages += [asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        self.images = []


def _lines() -> Iterator[str]:
    """What the user types, or the lines of standard input if that is not a terminal."""
    if not sys.stdin.isatty():
        try:
            yield from map(str.strip, sys.stdin)
        except UnicodeDecodeError as error:
            raise ValueError("Standard input is not UTF-8 text.") from error
        return
    with suppress(ImportError):
        # Importing it is what gives input() line editing and history.
        import readline  # noqa: F401
    show("Ask a question; /image PATH adds an image, /help lists the commands.", stderr=True)
    with suppress(EOFError):
        while True:
            yield input("> ").strip()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"The budget must be a number such as 0.1, got {quoted(text)}.") from None


def _read_key(file: Path) -> str:
    """The first line of a file that is neither empty nor a comment, as in the file of the server."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the API key from {printable(file)}.") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"There is no API key in {printable(file)}.")
    return keys[0]
