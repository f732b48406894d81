"""The results of a run for people: tables on the terminal, and files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sparsight.bench.speed_plots import draw_growth, draw_speed_up
from sparsight.utils.plot_style import save

Cell = Mapping[str, Any]
RESULTS = "bench.json"


def make_folder(folder: Path) -> None:
    """Make the folder that results go to.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).touch()
    except OSError as error:
        raise ValueError(f"Cannot write to {folder}: {error.strerror}.") from error


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Write ``bench.json`` into a folder that is there."""
    (folder / RESULTS).write_text(json.dumps(found, indent=1) + "\n")


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures into a folder that is there, and return their paths."""
    measured = [cell for cell in found["cells"] if cell["reason"] is None]
    figures = {"growth.png": draw_growth(measured)} if measured else {}
    if any(cell["of_full"]["token"] is not None for cell in measured):
        figures["speed-up.png"] = draw_speed_up(measured)
    for name, figure in figures.items():
        save(figure, folder / name)
    return [folder / name for name in figures]


def tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """For each size a headline, a table of times, what was not measured and why, and a table of costs and memory."""
    sizes = dict.fromkeys((cell["context"], cell["batch"]) for cell in found["cells"])
    for context, batch in sizes:
        cells = [cell for cell in found["cells"] if (cell["context"], cell["batch"]) == (context, batch)]
        measured = [cell for cell in cells if cell["reason"] is None]
        yield Text(f"prompt of {context} tokens, batch {batch}; x is of plain transformers' time", "bold")
        if measured:
            yield _times(measured)
        yield from (Text(f"{name_of(cell)}: {cell['reason']}", "dim") for cell in cells if cell["reason"] is not None)
        yield ""
        if measured:
            yield _costs(measured)
            yield ""


def _times(cells: Sequence[Cell]) -> Table:
    """Times with their spread and over the full cache's, and what decoding takes over its limits."""
    shown = _table(["first token", "a token", "end to end", "x kept\nlength", "x limit", "tokens\n/ s"])
    for cell in cells:
        shown.add_row(
            name_of(cell),
            *(_time(cell, stage) for stage in ("first_token", "token", "end_to_end")),
            _ratio(cell["of_kept_length"]),
            _ratio(cell["of_limit"]),
            number(cell["tokens_per_second"]),
        )
    return shown


def _costs(cells: Sequence[Cell]) -> Table:
    """What the prefill spends on compression, and memory."""
    columns = ["statistics", "compaction", "KV held", "x full", "peak", "batch\nthat fits"]
    shown = _table(columns)
    for cell in cells:
        peak = cell["peak_bytes"]
        shown.add_row(
            name_of(cell),
            *(_part(cell["seconds"][stage]) for stage in ("statistics", "compaction")),
            _mebibytes(cell["bytes_held"]),
            _ratio(cell["of_full"]["bytes"]),
            "-" if peak is None else _mebibytes(peak),
            f"{cell['batch_that_fits']:,}",
        )
    return shown


def _table(columns: Sequence[str]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1))
    shown.add_column("", header_style="bold cyan", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True, header_style="bold cyan")
    return shown


def name_of(cell: Cell) -> str:
    """A method and its budget."""
    return cell["method"] if cell["budget"] == 1 else f"{cell['method']} {cell['budget'] * 100:.3g} %"


def number(value: float) -> str:
    """A number for people, of three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(cell: Cell, stage: str) -> Text:
    spread, ratio = cell["seconds"][stage], cell["of_full"][stage]
    low, high = (number(spread[end] * 1e3) for end in ("low", "high"))
    beside = "" if ratio is None else f"\n{ratio:.3f} x"
    return Text.assemble(_milliseconds(spread["median"]), (f"\n{low}-{high}", "dim"), (beside, "dim"))


def _part(spread: Mapping[str, float] | None) -> str:
    return "-" if spread is None else _milliseconds(spread["median"])


def _milliseconds(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
