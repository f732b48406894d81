"""Printing on the terminal, where text from outside must not act as control sequences or markup."""

import sys
from pathlib import Path

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from sparsight.utils.text import escape

UNLIMITED = 100_000
"""Columns that no table needs."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Re-raise the BrokenPipeError, which `rich` would turn into a silent exit."""
        raise


def console(*, stderr: bool = False) -> Console:
    """A console that prints strings literally: no markup, no emoji codes, no highlighting."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show(*parts: RenderableType, stderr: bool = False) -> None:
    """Print texts and tables; a table's cells are never shortened, however narrow the terminal is."""
    for part in parts:
        terminal = console(stderr=stderr)
        if isinstance(part, Table):
            natural = terminal.measure(part, options=terminal.options.update(max_width=UNLIMITED)).maximum
            terminal.width = max(terminal.width, natural)
        terminal.print(part)


def stopped(output: Path) -> typer.Exit:
    """Say on stderr how to resume a run; returns the exit to raise."""
    print(f"Stopped. Results so far are saved; run the same command again to resume {escape(output)}.", file=sys.stderr)
    return typer.Exit(130)
