"""Write docs/accuracy.md, between its two markers, and the pages beside it, from the results in docs/accuracy/.

python -m benchmarks.accuracy docs/accuracy.md
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from docs.tables import table
from sparsight.eval.metrics import metrics_of
from sparsight.eval.render import CAPTIONS, markdown, rows, show, span

BEGIN, END = "<!-- results: written by benchmarks/accuracy.py -->", "<!-- end of results -->"
BUDGET = 0.1
"""The budget of the table on the page itself."""

LARGE = "reader-30"
"""The folder of the results on a larger model, which come first."""


def main(page: Annotated[Path, typer.Argument(help="The page; the results are in a folder of its name.")]) -> None:
    """Write the page, and one page for each task to the folder beside it."""
    for old in page.with_suffix("").rglob("*.md"):
        old.unlink()
    for path, text in pages(page).items():
        path.write_text(text)


def pages(page: Path) -> dict[Path, str]:
    """The texts of the page and of those beside it."""
    folder = page.with_suffix("")
    large, texts = "", dict[Path, str]()
    if (folder / LARGE / "results.json").exists():
        intro, table, texts = _run(folder / LARGE, page.parent)
        large = (
            f"### A language model of thirty pretrained layers\n\n{intro}\n\n{table}\n\n### The model that ships\n\n"
        )
    intro, table, own = _run(folder, page.parent)
    part = f"""{large}{intro}

### Every method at {BUDGET * 100:.3g} %

{table}

### Attention

![Where attention goes]({folder.name}/analysis.png)
"""
    text = page.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return {page: f"{before}{BEGIN}\n\n{part}\n{after}", **texts, **own}


def _run(folder: Path, root: Path) -> tuple[str, str, dict[Path, str]]:
    """What a run's folder gives: an introduction with figures, the table with links, and the tasks' pages."""
    name = folder.relative_to(root)
    results = json.loads((folder / "results.json").read_text())
    figures = {each: f"{name}/{each}.png" for each in CAPTIONS if (folder / f"{each}.png").exists()}
    intro, *sections = markdown(results, figures).split("\n### ")
    texts = {folder / _file(task): f"# {section}" for task, section in zip(results["tasks"], sections, strict=True)}
    links = ", ".join(f"[{task['task']}]({name}/{_file(task)})" for task in results["tasks"])
    return intro.strip(), f"{summary(results)}\n\nAll budgets and metrics: {links}.", texts


def summary(results: Mapping[str, Any]) -> str:
    """Each task's main metric at one budget: a row for the full cache and for each method."""
    columns = [dict(_column(results, task)) for task in results["tasks"]]
    header = [f"{task['task']}, {metrics_of(task)[task['metric']].title}" for task in results["tasks"]]
    return table(["", *header], [[method, *(column[method] for column in columns)] for method in columns[0]])


def _column(results: Mapping[str, Any], task: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The cells of a task by method."""
    metric, full = metrics_of(task)[task["metric"]], task["full"][task["metric"]]
    yield "full cache", f"{show(metric, full['value'])} ({span(metric, full)})"
    for method, cells in rows(results, task, task["metric"]):
        cell = next(cell for cell in cells if cell["budget"] == BUDGET)
        value = f"**{cell['value']}**" if cell["best"] else cell["value"]
        yield f"`{method}`", f"{value}{cell['mark'].strip()} ({cell['span']})"


def _file(task: Mapping[str, Any]) -> str:
    """The name of a task's page."""
    return task["task"].replace(":", "-") + ".md"


if __name__ == "__main__":
    typer.run(main)
