"""Candidates for the `sparsight` recipe, which differ in one parameter each, on pages of the training split.

    python -m benchmarks.recipe_candidates --output benchmarks/results/own

An interrupted run can be resumed. The table is printed, and written to ``candidates.json``.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from sparsight import Recipe
from sparsight.compression import AcrossHeads, Evict, Grow, PostVision, SparsityAware, Uniform
from sparsight.compression.allocate import KeepRatio, LayerStatistics
from sparsight.compression.score import Window
from sparsight.eval.evaluator import EvaluationConfig, run_evaluation, weights_digest
from sparsight.eval.result_store import ResultStore
from sparsight.eval.tasks import Task
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader import model_path
from sparsight.reader.skills import Example, compare, look_at, look_up, read_out

BUDGETS = (0.03, 0.05, 0.1)


def task(name: str, make: Callable[[np.random.Generator], Example]) -> Task:
    """A task on the training split."""
    return Task(name, "", 1, "", 1, "exact", lambda rng, _size, _number: make(rng))


TASKS = (
    task("look-up 32", lambda rng: look_up(rng, "train", 32)),
    task("look-up 64", lambda rng: look_up(rng, "train", 64)),
    task("two images", lambda rng: compare(rng, "train")),
    task("scene", lambda rng: look_at(rng, "train")),
    task("reading 8", lambda rng: read_out(rng, "train", 8)),
)


@dataclass(frozen=True)
class PartlyEqual(SparsityAware):
    """Budgets by sparsity, a part of which is the same for every layer."""

    equal: float = 0.75

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Fraction of the prompt's entries that each layer keeps."""
        by_sparsity: list[Any] = super().shares(layers, budget)
        return [self.equal * budget + (1 - self.equal) * share for share in by_sparsity]


def candidates() -> list[Recipe]:
    """A base recipe, and recipes that differ from it in one parameter each."""

    def made(name: str, pool: Window = (1, 5), allocate: Any = None, reduce: Any = None) -> Recipe:
        return Recipe(name, 0.1, PostVision(pool=pool), allocate or Uniform(), reduce or Evict(recent=0.2), Grow())

    windows: list[Window] = [1, 7, (1, 3), (1, 5), (1, 7), (1, 9), (3, 3), (3, 5)]
    return [
        *(made(f"window {window}", window) for window in windows),
        made("sparsity", allocate=SparsityAware()),
        made("sparsity, half equal", allocate=PartlyEqual(equal=0.5)),
        made("sparsity, 75 % equal", allocate=PartlyEqual(equal=0.75)),
        made("across heads", allocate=AcrossHeads()),
        made("across heads, floor half", allocate=AcrossHeads(floor=0.5)),
        made("recent 10 %", reduce=Evict(recent=0.1)),
        made("recent 30 %", reduce=Evict(recent=0.3)),
        made("recent 50 %", reduce=Evict(recent=0.5)),
        made("last 10", reduce=Evict(recent=0, last=10)),
        made("first 1", reduce=Evict(recent=0.2, first=1)),
        made("one choice a layer", reduce=Evict(recent=0.2, per_head=False)),
    ]


def main(
    output: Annotated[Path, typer.Option()],
    limit: Annotated[int, typer.Option(help="Examples per task.")] = 200,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Measure the candidates: exact match; for reading, equality with the full cache's tokens."""
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(str(model_path()))
    model = load_model(checkpoint)
    recipes = [replace(one, budget=budget) for one in candidates() for budget in BUDGETS]
    store = ResultStore(output, {"weights": weights_digest(model), "seed": seed, "split": "train"})
    config = EvaluationConfig(TASKS, recipes, limit, seed, 32)
    run_evaluation(config, model, checkpoint.processor, store, lambda *done: print(*done))
    means = {}
    for one in recipes:
        cells = {each.name: store.cell(each.label, one.to_json()) for each in TASKS}
        means[f"{one.name} @ {one.budget}"] = {
            name: float(np.mean([result["same_tokens" if "reading" in name else "exact"] for result in cell.values()]))
            for name, cell in cells.items()
        }
    (output / "candidates.json").write_text(json.dumps(means, indent=1) + "\n")
    shown = Table("recipe", *(each.name for each in TASKS), "mean", box=None)
    for name, values in means.items():
        shown.add_row(name, *(f"{value:.3f}" for value in values.values()), f"{np.mean(list(values.values())):.3f}")
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
