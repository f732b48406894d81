"""The progress bar of a long-running command."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar with the time left on stderr, if that is a terminal; yields ``update(description, done, total)``."""
    console = Console(stderr=True)
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
