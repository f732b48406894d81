"""Figures of a run: every method against the budget, a panel per task."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from sparsight.eval.metrics import Metric, metrics_of
from sparsight.utils.plot_style import COLORS, DPI, FAINT, INK, MARKERS, MUTED

PANEL = 4.3, 3.6
"""Inches."""

LEGEND_ROWS = 16
"""Rows of a legend beside a panel, at most."""


def draw_budgets(results: Mapping[str, Any], metric: str | None = None) -> Figure:
    """A metric (by default the task's main one) of every method against the budget, a panel per task."""
    tasks = results["tasks"]
    figure, panels, spare = _grid(len(tasks), 1 + len(methods_of(results)))
    for panel, task in zip(panels, tasks, strict=True):
        name = metric or task["metric"]
        _panel(panel, f"{task['task']}  ({task['examples']} examples)", metrics_of(task)[name])
        full = task["full"][name]
        panel.axhspan(full["low"], full["high"], color=FAINT, alpha=0.6, linewidth=0)
        panel.axhline(full["value"], color=INK, linewidth=1.1, dashes=(4, 3), label="full cache")
        for order, method in enumerate(methods_of(results)):
            cells = [cell for cell in task["cells"] if cell["method"] == method]
            values = [cell["metrics"][name] for cell in cells]
            panel.errorbar(
                [cell["budget"] * _offset(order, len(methods_of(results))) for cell in cells],
                [each["value"] for each in values],
                yerr=[
                    [max(0.0, each["value"] - each["low"]) for each in values],
                    [max(0.0, each["high"] - each["value"]) for each in values],
                ],
                **_style(order),
                label=method,
            )
        _budget_axis(panel, sorted({cell["budget"] for cell in task["cells"]}))
    _legend(figure, panels, spare)
    return figure


def draw_page_sizes(results: Mapping[str, Any], budget: float) -> Figure | None:
    """The main metric of every method against the records on the page; None if no task has pages of several sizes."""
    tasks = [task for task in results["tasks"] if task.get("full_by_records")]
    if not tasks:
        return None
    figure, panels, spare = _grid(len(tasks), 1 + len(methods_of(results)))
    for panel, task in zip(panels, tasks, strict=True):
        _panel(panel, f"{task['task']} at {budget * 100:.3g} %", metrics_of(task)[task["metric"]])
        full = task["full_by_records"]
        panel.plot([int(size) for size in full], list(full.values()), color=INK, dashes=(4, 3), label="full cache")
        for order, method in enumerate(methods_of(results)):
            for cell in task["cells"]:
                if (cell["method"], cell["budget"]) == (method, budget):
                    sizes = cell["by_records"]
                    style = {name: value for name, value in _style(order).items() if name != "elinewidth"}
                    panel.plot([int(size) for size in sizes], list(sizes.values()), **style, label=method)
        panel.set_xlabel("records on the page", size=9, color=MUTED)
    _legend(figure, panels, spare)
    return figure


def methods_of(results: Mapping[str, Any]) -> list[str]:
    """The methods of a run, in order of appearance."""
    return list(dict.fromkeys(cell["method"] for task in results["tasks"] for cell in task["cells"]))


def _grid(count: int, names: int) -> tuple[Figure, list[Axes], Axes | None]:
    """A figure, its panels, and the axes for the legend of ``names`` if the last row has free space."""
    columns = min(3, count)
    rows = -(-count // columns)
    legend_width = 0 if rows * columns > count else 1.7 * _legend_columns(names)
    figure = Figure(
        figsize=(PANEL[0] * columns + legend_width, PANEL[1] * rows), dpi=DPI, facecolor="white", layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count], axes[count] if axes[count:] else None


def _panel(panel: Axes, title: str, metric: Metric) -> None:
    panel.set_title(title, size=10.5, weight="bold", color=INK, loc="left")
    panel.set_ylabel(metric.title.replace(", ", ",\n"), size=9, color=MUTED, labelpad=1)
    if metric.percent:
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif metric.exponential:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    panel.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    panel.grid(color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)


def _style(order: int) -> dict[str, Any]:
    return {
        "color": COLORS[order % len(COLORS)],
        "marker": MARKERS[order % len(MARKERS)],
        # More methods than colors: the others have dashed lines and hollow markers.
        "linestyle": "-" if order < len(COLORS) else "--",
        "markerfacecolor": COLORS[order] if order < len(COLORS) else "white",
        "markersize": 4.5,
        "linewidth": 1.5,
        "elinewidth": 0.8,
        "alpha": 0.95,
    }


def _offset(order: int, count: int) -> float:
    """A factor on the x axis that keeps the intervals of methods apart."""
    return 1.012 ** (2 * order - count + 1)


def _budget_axis(panel: Axes, budgets: Sequence[float]) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(list(budgets)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g} %"))
    panel.set_xlabel("budget", size=9, color=MUTED)


def _legend(figure: Figure, panels: Sequence[Axes], spare: Axes | None) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    if spare is None:
        figure.legend(handles, labels, loc="outside right upper", ncols=_legend_columns(len(handles)), **style)
    else:
        spare.legend(handles, labels, loc="center left", ncols=2, **style)


def _legend_columns(names: int) -> int:
    """Columns of a legend beside one row of panels."""
    return -(-names // LEGEND_ROWS)
