"""Pictures of a run: speed-up over plain transformers, and how costs grow with the context."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from sparsight.bench.rounds import KEPT_LENGTH, KVPRESS, OTHERS, TRANSFORMERS
from sparsight.utils.plot_style import COLORS, DPI, FAINT, INK, MARKERS, MUTED

Cell = Mapping[str, Any]
PANEL = 3.9, 2.9
"""Inches."""

STYLES = {TRANSFORMERS: (INK, (4, 3), "."), KEPT_LENGTH: (MUTED, (1, 2), "."), KVPRESS: (COLORS[-1], (3, 1), "x")}
"""Colour, dashes and marker of what methods are compared with."""

SPEED_UP: dict[str, Callable[[Cell], float | None]] = {
    "decoding, x faster": lambda cell: _inverse(cell["of_full"]["token"]),
    # Whoever reads the kept length alone has not read the prompt.
    "end to end, x faster": lambda cell: (
        None if cell["method"] == KEPT_LENGTH else _inverse(cell["of_full"]["end_to_end"])
    ),
}
GROWTH: dict[str, Callable[[Cell], float | None]] = {
    "first token, s": lambda cell: cell["seconds"]["first_token"]["median"],
    "a token, ms": lambda cell: cell["seconds"]["token"]["median"] * 1e3,
    "KV held, MiB": lambda cell: cell["bytes_held"] / 2**20,
}


def draw_speed_up(cells: Sequence[Cell]) -> Figure:
    """How much faster than plain transformers every method decodes and answers, by context, a column for each batch."""
    figure = _draw(cells, SPEED_UP)
    for panel in figure.axes:
        panel.set_ylim(bottom=0)
    return figure


def draw_growth(cells: Sequence[Cell]) -> Figure:
    """Times and bytes of every method by context, both on logarithmic axes, a column for each batch."""
    figure = _draw(cells, GROWTH)
    for panel in figure.axes:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _draw(cells: Sequence[Cell], rows: Mapping[str, Callable[[Cell], float | None]]) -> Figure:
    batches = sorted({cell["batch"] for cell in cells})
    contexts = sorted({cell["context"] for cell in cells})
    lines = list(dict.fromkeys((cell["method"], cell["budget"]) for cell in cells))
    size = PANEL[0] * len(batches) + 1.9, PANEL[1] * len(rows)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    grid = figure.subplots(len(rows), len(batches), squeeze=False, sharey="row")
    for panels, (title, take) in zip(grid, rows.items(), strict=True):
        for panel, batch in zip(panels, batches, strict=True):
            for order, line in enumerate(sorted(lines, key=lambda line: line[0] in OTHERS)):
                points = [
                    (cell["context"], value)
                    for cell in cells
                    if ((cell["method"], cell["budget"]), cell["batch"]) == (line, batch)
                    and (value := take(cell)) is not None
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), **_style(line[0], order), label=_label(*line))
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
    if method in OTHERS:
        color, dashes, marker = STYLES[method]
        return {"color": color, "dashes": dashes, "linewidth": 1.3, "marker": marker, "markersize": 5}
    return {
        "color": COLORS[order % len(COLORS)],
        "marker": MARKERS[order % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.5,
    }


def tokens(count: int) -> str:
    """A number of tokens for people: ``2k`` is 2048."""
    return f"{count // 1024}k" if count % 1024 == 0 and count else str(count)


def _label(method: str, budget: float) -> str:
    return method if budget == 1 else f"{method} {budget * 100:.3g} %"


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1 / ratio
