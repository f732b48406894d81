"""The progress bar of a long-running command."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsight.cli.terminal import console
from sparsight.utils.text import escape

Item = TypeVar("Item")


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar with the time left on stderr, if that is a terminal; yields ``update(description, done, total)``."""
    terminal = console(stderr=True)
    columns: Sequence[Any] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    hidden = quiet or not terminal.is_terminal
    # Steps may take half a minute.
    with Progress(*columns, console=terminal, disable=hidden, speed_estimate_period=600) as bar:
        task = bar.add_task(title, total=None)
        yield lambda text, done, total: bar.update(task, description=escape(text), completed=done, total=total)


def tracked(items: Iterable[Item], title: str, total: int, *, quiet: bool) -> Iterator[Item]:
    """``items``, with a bar of how many have been processed."""
    with progress(title, quiet=quiet) as update:
        update(title, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            update(title, done, total)
