"""Printing on the terminal, where text from outside must not act as control sequences or markup."""

import sys
import unicodedata
from pathlib import Path

import typer
from rich.console import Console, RenderableType
from rich.table import Table

ESCAPED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, lone surrogates, and line and paragraph separators."""

UNLIMITED = 100_000
"""Columns that no table needs."""


def printable(text: object, keep: str = "") -> str:
    r"""``str(text)`` with control characters, except those in ``keep``, as escape sequences such as ``\x1b``."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in keep and unicodedata.category(character) in ESCAPED
        else character
        for character in str(text)
    )


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Re-raise the BrokenPipeError, which `rich` would turn into a silent exit."""
        raise


def console(*, stderr: bool = False) -> Console:
    """A console that prints strings literally: no markup, no emoji codes, no highlighting."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show(*parts: RenderableType) -> None:
    """Print texts and tables; a table's cells are never shortened, however narrow the terminal is."""
    for part in parts:
        terminal = console()
        if isinstance(part, Table):
            natural = terminal.measure(part, options=terminal.options.update(max_width=UNLIMITED)).maximum
            terminal.width = max(terminal.width, natural)
        terminal.print(part)


def stopped(output: Path) -> typer.Exit:
    """Say on stderr how to resume a run; returns the exit to raise."""
    print(
        f"Stopped. Results so far are saved; run the same command again to resume {printable(output)}.", file=sys.stderr
    )
    return typer.Exit(130)
