"""Tables that papers published, as data, beside what was measured with Sparsight through lmms-eval.

A paper is a JSON file of tables. A table has budgets, tasks (with lmms-eval's name and metric) and models, and for each
model the values, in percent, of the full cache by task and of each method by task and budget.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsight.utils.suggest import unknown

FOLDER = Path(__file__).parent
PAPERS = sorted(path.stem for path in FOLDER.glob("*.json"))
"""The papers, by the name of their method."""

EVERY_EXAMPLE = 10_000
"""A limit above the sizes of the papers' benchmarks."""

Measured = dict[tuple[str, str, str, str, float], float]
"""Values in percent by checkpoint, lmms-eval's task and metric, method and budget."""


def load_paper(name: str) -> dict[str, Any]:
    """A paper's tables.

    Raises:
        ValueError: there are no tables of such a paper.
    """
    if name not in PAPERS:
        raise unknown("paper", name, PAPERS)
    return json.loads((FOLDER / f"{name}.json").read_text())


def checkpoints(paper: Mapping[str, Any]) -> list[str]:
    """The hub ids of a paper's models."""
    return list(dict.fromkeys(model["checkpoint"] for table in paper["tables"] for model in table["models"]))


def cells(paper: Mapping[str, Any], measured: Measured) -> Iterator[dict[str, Any]]:
    """Every cell of a paper's tables with its source; ``ours`` is the value measured with Sparsight, or None."""
    for table in paper["tables"]:
        for model in table["models"]:
            full = {"full": [[value] for value in model["full"]]}
            for method, by_task in (full | model["methods"]).items():
                for task, values in zip(table["tasks"], by_task, strict=True):
                    for budget, value in zip([1.0] if method == "full" else table["budgets"], values, strict=True):
                        key = (model["checkpoint"], task["task"], task["metric"], method, budget)
                        yield {
                            "paper": paper["title"],
                            "arxiv": paper["arxiv"],
                            "table": table["table"],
                            "model": model["name"],
                            "checkpoint": model["checkpoint"],
                            "benchmark": task["name"],
                            "task": task["task"],
                            "metric": task["metric"],
                            "method": method,
                            "budget": budget,
                            "value": value,
                            "ours": measured.get(key),
                        }


def command(paper: Mapping[str, Any], checkpoint: str, folder: Path) -> str:
    """The command that measures a checkpoint's cells into ``folder``."""
    own = [cell for cell in cells(paper, {}) if cell["checkpoint"] == checkpoint and cell["method"] != "full"]
    tasks, methods, budgets = (dict.fromkeys(cell[name] for cell in own) for name in ("task", "method", "budget"))
    return (
        f"sparsight eval --harness lmms-eval --model {checkpoint} --tasks {','.join(tasks)} "
        f"--methods {','.join(methods)} --budgets {','.join(map(str, sorted(budgets)))} --limit {EVERY_EXAMPLE} "
        f"--output {folder / checkpoint.rpartition('/')[2]}"
    )


def read_measured(folder: Path) -> Measured:
    """What runs in the folders of ``folder`` have measured.

    Raises:
        ValueError: one of their files is damaged.
    """
    values: Measured = {}
    for path in sorted(folder.glob("*/results.json")):
        try:
            results = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"The results in {path} are damaged.") from error
        for task in results["tasks"]:
            full = {"method": "full", "budget": 1.0, "metrics": task["full"]}
            for cell in [full, *task["cells"]]:
                for metric, found in cell["metrics"].items():
                    key = (results["model"], task["task"], metric, cell["method"], cell["budget"])
                    values[key] = 100 * found["value"]
    return values
