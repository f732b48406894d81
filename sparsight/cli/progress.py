"""How far a long command has come."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with the time left, if there is somebody to see it: it is told a text, steps done and all."""
    console = Console(stderr=True)
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(
        *columns, console=console, disable=quiet or not console.is_terminal, speed_estimate_period=600
    ) as bar:
        shown = bar.add_task(title, total=None)
        yield lambda text, done, total: bar.update(shown, description=text, completed=done, total=total)
