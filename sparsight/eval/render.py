"""Human-readable results of a run: tables for the terminal, Markdown, and a self-contained HTML page."""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from sparsight.eval.accuracy_plots import draw_budgets, draw_page_sizes, methods_of
from sparsight.eval.aggregation import BASELINE, best
from sparsight.eval.metrics import Metric, metrics_of
from sparsight.utils.plot_style import save

SIGNIFICANT = 0.05
CAPTIONS = {
    "accuracy": "Each task's main metric against the budget; bars and band are 95 % intervals.",
    "perplexity": "Perplexity of the right answers with each cache.",
    "divergence": "KL divergence of the next token's distribution from the full cache's.",
    "records": "Accuracy by the number of records on the page, at one budget.",
}
"""Captions of the figures by name."""


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``results.json``, ``report.md``, ``report.html`` and the figures to a folder; return their paths."""
    figures = {}
    for name, figure in draw(results).items():
        figures[name] = folder / f"{name}.png"
        save(figure, figures[name])
    texts = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "report.md": markdown(results, {name: path.name for name, path in figures.items()}),
        "report.html": _render("report.html", results, {name: _inline(path) for name, path in figures.items()}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [*(folder / name for name in texts), *figures.values()]


def markdown(results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """``report.md``, with the paths of the figures by name: the figures, then a section ``### TASK`` for each task."""
    return _render("report.md", results, figures)


def draw(results: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a run by name."""
    figures = {"accuracy": draw_budgets(results)}
    for name in ("perplexity", "divergence"):
        if all(name in task["metrics"] for task in results["tasks"]):
            figures[name] = draw_budgets(results, name)
    budgets = budgets_of(results)
    growing = draw_page_sizes(results, min(budgets, key=lambda budget: abs(budget - 0.1))) if budgets else None
    return figures | ({"records": growing} if growing is not None else {})


def budgets_of(results: Mapping[str, Any]) -> list[float]:
    """The budgets of a run, ascending."""
    return sorted({cell["budget"] for task in results["tasks"] for cell in task["cells"]})


def tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """A headline and a table per task: methods by budgets, each with its interval below, the best values in bold.

    With the full cache alone the headlines say everything and the tables are empty.
    """
    for task in results["tasks"]:
        metric = metrics_of(task)[task["metric"]]
        full = task["full"][task["metric"]]
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(task["cells"]))
        shown.add_column("method", header_style="bold cyan")
        for budget in budgets_of(results):
            shown.add_column(f"{budget * 100:.3g} %", justify="right", header_style="bold cyan")
        for method, row in rows(results, task, task["metric"]):
            shown.add_row(
                method,
                *(
                    Text.assemble(
                        (got["value"], "bold" if got["best"] else ""), got["mark"], ("\n" + got["span"], "dim")
                    )
                    for got in row
                ),
            )
        headline = (
            f"{task['task']}, {task['summary']}: {metric.title}, {task['examples']} examples, "
            f"full cache {show(metric, full['value'])} ({span(metric, full)})"
        )
        yield headline, shown


def rows(results: Mapping[str, Any], task: Mapping[str, Any], name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """A task's table of a metric: each method with a mapping per budget of ``budget``, ``value``, ``span``, ``best``,
    ``mark`` and ``p_value``.

    The mark is ``+`` or ``-`` where the method is better or worse than VL-Cache at the same budget with p < 0.05.
    """
    metric = metrics_of(task)[name]
    table = []
    for method in methods_of(results):
        cells = sorted((cell for cell in task["cells"] if cell["method"] == method), key=lambda cell: cell["budget"])
        row = []
        for cell in cells:
            found = cell["metrics"][name]
            row.append(
                {
                    "budget": cell["budget"],
                    "value": show(metric, found["value"]),
                    "span": span(metric, found),
                    "best": found["value"] == best(task, name, cell["budget"]),
                    "mark": _mark(task, cell, name),
                    "p_value": found["p_value"],
                }
            )
        table.append((method, row))
    return table


def show(metric: Metric, value: float) -> str:
    """A value as text."""
    return f"{value * 100:.1f}" if metric.percent else f"{value:.3g}"


def span(metric: Metric, found: Mapping[str, float]) -> str:
    """An interval as text."""
    return f"{show(metric, found['low'])}-{show(metric, found['high'])}"


def _mark(task: Mapping[str, Any], cell: Mapping[str, Any], name: str) -> str:
    found = cell["metrics"][name]
    if found["p_value"] is None or found["p_value"] >= SIGNIFICANT:
        return " "
    own = (BASELINE, cell["budget"])
    baseline = next(other for other in task["cells"] if (other["method"], other["budget"]) == own)
    better = (found["value"] > baseline["metrics"][name]["value"]) == metrics_of(task)[name].higher_is_better
    return "+" if better else "-"


def _render(template: str, results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    environment = Environment(
        loader=PackageLoader("sparsight.eval"), autoescape=template.endswith("html"), trim_blocks=True
    )
    return environment.get_template(f"{template}.jinja").render(
        results=results,
        budgets=budgets_of(results),
        metrics_of=metrics_of,
        rows=rows,
        show=show,
        span=span,
        baseline=BASELINE,
        figures=[(path, CAPTIONS[name]) for name, path in figures.items()],
    )


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
