"""Elastic Cache on text, part by part: which of its rules costs what, on a pretrained language model.

    sparsight models --install smollm2
    python -m benchmarks.elastic_text --output runs/elastic-text

An interrupted run can be resumed. The table is printed, and written to ``elastic-text.json``.
"""

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsight import Recipe, recipe
from sparsight.compression import Accumulated, Evict, MergeNearest
from sparsight.compression.score import Grids
from sparsight.eval.aggregation import aggregate
from sparsight.eval.evaluator import EvaluationConfig, run_evaluation, weights_digest
from sparsight.eval.metrics import metrics_of
from sparsight.eval.render import show, span
from sparsight.eval.result_store import ResultStore
from sparsight.eval.tasks import TEXT_TASKS, task
from sparsight.methods import ElasticCache
from sparsight.models.loading import load_checkpoint, load_model

BUDGETS = (0.2, 0.4, 0.6, 0.8)


class MergeValues(MergeNearest):
    """Values merge, and every anchor keeps its own key."""

    def apply(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that stay, ``[H_kv, kept, D]``, of ``[H_kv, T, D]``."""
        return Evict().apply(keys, keys, positions)[0], super().apply(values, values, positions)[1]


@dataclass(frozen=True)
class ReleasedOrder(Accumulated):
    """The order in which the released code chooses: it compares ``argsort(score)``, not the rank, with a threshold."""

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``."""
        return torch.argsort(sums.mean(0)).float().expand_as(sums)


def variants() -> list[Recipe]:
    """Elastic Cache, the same with one rule changed, and what it is compared with."""
    elastic = ElasticCache()
    evict = Evict(recent=0, first=1, per_head=False)
    named = {
        "elastic": elastic,
        "values merge, keys do not": replace(elastic, reduce=MergeValues()),
        "evicting": replace(elastic, reduce=evict),
        "evicting, half recent": replace(elastic, reduce=replace(evict, recent=0.5)),
        "the released order": replace(elastic, score=ReleasedOrder()),
        "the released order, evicting": replace(elastic, score=ReleasedOrder(), reduce=evict),
        "h2o": recipe("h2o"),
    }
    return [replace(each, name=name, budget=budget) for name, each in named.items() for budget in BUDGETS]


def main(
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    limit: Annotated[int, typer.Option(help="Number of passages.", min=2)] = 4,
    words: Annotated[int, typer.Option(help="Words of a passage.", min=1)] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the passages.", min=0)] = 1,
) -> None:
    """Measure the variants and print a table."""
    checkpoint = load_checkpoint("smollm2", text=True)
    model = load_model(checkpoint, "cpu", "float32")
    tasks = [task(f"continuation:{words}", TEXT_TASKS)]
    config = EvaluationConfig(tasks, variants(), limit, seed, limit)
    about = {"weights": weights_digest(model), "seed": seed, "python": platform.python_version()}
    with ResultStore(output, about) as store:
        run_evaluation(config, model, checkpoint.processor, store)
        results = aggregate(config, store)
    (output / "elastic-text.json").write_text(json.dumps(results, indent=1) + "\n")
    (found,) = results["tasks"]
    for name in ("perplexity", "divergence"):
        metric = metrics_of(found)[name]
        shown = Table(title=f"{metric.title}; full cache {show(metric, found['full'][name]['value'])}", box=None)
        for column in ("", *(f"{budget:.0%}" for budget in BUDGETS)):
            shown.add_column(column)
        for variant in dict.fromkeys(cell["method"] for cell in found["cells"]):
            cells = [cell["metrics"][name] for cell in found["cells"] if cell["method"] == variant]
            shown.add_row(variant, *(f"{show(metric, cell['value'])} ({span(metric, cell)})" for cell in cells))
        Console(width=140).print(shown)


if __name__ == "__main__":
    typer.run(main)
