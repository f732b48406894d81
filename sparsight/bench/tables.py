"""Human-readable results of a benchmark: tables for the terminal, and files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sparsight.bench.speed_plots import case_name, draw_growth, draw_speed_up
from sparsight.utils.plot_style import save

CaseResult = Mapping[str, Any]
RESULTS = "bench.json"
LEGEND = (
    "vs short prompt: time per token over that of transformers with a prompt of only the kept length. "
    "vs bandwidth: time per token over the time to read the weights and KV entries at the bandwidth of a copy.\n"
)


def make_folder(folder: Path) -> None:
    """Make the folder for results.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).touch()
    except OSError as error:
        raise ValueError(f"Cannot write to {folder}: {error.strerror}.") from error


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``bench.json`` to an existing folder."""
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n")


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the figures to an existing folder, and return their paths."""
    measured = [case for case in results["cells"] if case["reason"] is None]
    figures = {"growth.png": draw_growth(measured)} if measured else {}
    if any(case["of_full"]["token"] is not None for case in measured):
        figures["speed-up.png"] = draw_speed_up(measured)
    for name, figure in figures.items():
        save(figure, folder / name)
    return [folder / name for name in figures]


def tables(results: Mapping[str, Any]) -> Iterator[RenderableType]:
    """For each size a headline, a table of times, the reasons of cases without results, and a table of costs."""
    sizes = dict.fromkeys((case["context"], case["batch"]) for case in results["cells"])
    for context, batch in sizes:
        cases = [case for case in results["cells"] if (case["context"], case["batch"]) == (context, batch)]
        measured = [case for case in cases if case["reason"] is None]
        yield Text(f"prompt of {context} tokens, batch {batch}: median, range, ratio to plain transformers", "bold")
        if measured:
            yield _times(measured)
        yield from (Text(f"{name_of(case)}: {case['reason']}", "dim") for case in cases if case["reason"] is not None)
        yield ""
        if measured:
            yield _costs(measured)
            yield ""
    yield Text(LEGEND, "dim")


def _times(cases: Sequence[CaseResult]) -> Table:
    """Times with ranges and ratios, the time per token over its two limits, and throughput."""
    shown = _table(["first token", "per token", "end to end", "vs short\nprompt", "vs band-\nwidth", "tokens\nper s"])
    for case in cases:
        shown.add_row(
            name_of(case).replace(", ", ",\n"),
            *(_time(case, stage) for stage in ("first_token", "token", "end_to_end")),
            _ratio(case["of_kept_length"]),
            _ratio(case["of_limit"]),
            number(case["tokens_per_second"]),
        )
    return shown


def _costs(cases: Sequence[CaseResult]) -> Table:
    """Time of compression within the first token's, and memory."""
    shown = _table(["statistics", "compaction", "KV\ncache", "vs full\ncache", "peak\nmemory", "largest\nbatch"])
    for case in cases:
        peak = case["peak_bytes"]
        shown.add_row(
            name_of(case).replace(", ", ",\n"),
            *(_part(case["seconds"][stage]) for stage in ("statistics", "compaction")),
            _mebibytes(case["bytes_held"]),
            _ratio(case["of_full"]["bytes"]),
            "-" if peak is None else _mebibytes(peak),
            f"{case['batch_that_fits']:,}",
        )
    return shown


def _table(columns: Sequence[str]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1))
    shown.add_column("", header_style="bold cyan", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True, header_style="bold cyan")
    return shown


def name_of(case: CaseResult) -> str:
    """A method and its budget, in words."""
    return case_name(case["method"], case["budget"])


def number(value: float) -> str:
    """A number as text, with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(case: CaseResult, stage: str) -> Text:
    times, ratio = case["seconds"][stage], case["of_full"][stage]
    low, high = (number(times[end] * 1e3) for end in ("low", "high"))
    ratio_line = "" if ratio is None else f"\n{ratio:.3f} x"
    return Text.assemble(_milliseconds(times["median"]), (f"\n{low}-{high}", "dim"), (ratio_line, "dim"))


def _part(times: Mapping[str, float] | None) -> str:
    return "-" if times is None else _milliseconds(times["median"])


def _milliseconds(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
