"""Figures of a benchmark: speed-up over plain transformers, and times and memory by context."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from sparsight.bench.benchmark import KEPT_LENGTH, KVPRESS, REFERENCES, TRANSFORMERS
from sparsight.utils.plot_style import COLORS, DPI, FAINT, INK, MARKERS, MUTED

CaseResult = Mapping[str, Any]
PANEL = 3.9, 2.9
"""Inches."""

STYLES = {TRANSFORMERS: (INK, (4, 3), "."), KEPT_LENGTH: (MUTED, (1, 2), "."), KVPRESS: (COLORS[-1], (3, 1), "x")}
"""Color, dashes and marker of the references."""

SPEED_UP: dict[str, Callable[[CaseResult], float | None]] = {
    "decoding, speed-up": lambda case: _inverse(case["of_full"]["token"]),
    # A shortened prompt has another prefill.
    "end to end, speed-up": lambda case: (
        None if case["method"] == KEPT_LENGTH else _inverse(case["of_full"]["end_to_end"])
    ),
}
GROWTH: dict[str, Callable[[CaseResult], float | None]] = {
    "first token, s": lambda case: case["seconds"]["first_token"]["median"],
    "per token, ms": lambda case: case["seconds"]["token"]["median"] * 1e3,
    "KV cache, MiB": lambda case: case["bytes_held"] / 2**20,
}


def draw_speed_up(cases: Sequence[CaseResult]) -> Figure:
    """Speed-up of every method over plain transformers by context, a column per batch size."""
    figure = _draw(cases, SPEED_UP)
    for panel in figure.axes:
        panel.set_ylim(bottom=0)
    return figure


def draw_growth(cases: Sequence[CaseResult]) -> Figure:
    """Times and bytes of every method by context on logarithmic axes, a column per batch size."""
    figure = _draw(cases, GROWTH)
    for panel in figure.axes:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _draw(cases: Sequence[CaseResult], rows: Mapping[str, Callable[[CaseResult], float | None]]) -> Figure:
    batches = sorted({case["batch"] for case in cases})
    contexts = sorted({case["context"] for case in cases})
    lines = list(dict.fromkeys((case["method"], case["budget"]) for case in cases))
    size = PANEL[0] * len(batches) + 1.9, PANEL[1] * len(rows)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    grid = figure.subplots(len(rows), len(batches), squeeze=False, sharey="row")
    for panels, (title, quantity) in zip(grid, rows.items(), strict=True):
        for panel, batch in zip(panels, batches, strict=True):
            for order, line in enumerate(sorted(lines, key=lambda line: line[0] in REFERENCES)):
                points = [
                    (case["context"], value)
                    for case in cases
                    if ((case["method"], case["budget"]), case["batch"]) == (line, batch)
                    and (value := quantity(case)) is not None
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), **_style(line[0], order), label=case_name(*line))
            _frame(panel, title if panel is panels[0] else "", contexts)
    for panel, batch in zip(grid[0], batches, strict=True):
        panel.set_title(f"batch {batch}", size=10.5, weight="bold", color=INK, loc="left")
    for panel in grid[-1]:
        panel.set_xlabel("prompt tokens", size=9, color=MUTED)
    named = {
        label: handle for panel in grid.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _frame(panel: Axes, title: str, contexts: Sequence[int]) -> None:
    panel.set_ylabel(title, size=9, color=MUTED)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(contexts))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    panel.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    panel.grid(color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)


def _style(method: str, order: int) -> dict[str, Any]:
    if method in REFERENCES:
        color, dashes, marker = STYLES[method]
        return {"color": color, "dashes": dashes, "linewidth": 1.3, "marker": marker, "markersize": 5}
    return {
        "color": COLORS[order % len(COLORS)],
        "marker": MARKERS[order % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.5,
    }


def tokens(count: int) -> str:
    """A number of tokens as text; ``2k`` is 2048."""
    return f"{count // 1024}k" if count % 1024 == 0 and count else str(count)


def case_name(method: str, budget: float) -> str:
    """A method and its budget in words."""
    percent = f"{budget * 100:.3g} %"
    if method == KEPT_LENGTH:
        return f"{TRANSFORMERS}, {percent} of prompt"
    return method if budget == 1 else f"{method} {percent}"


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1 / ratio
