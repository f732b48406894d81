"""Recall while decoding: how often, by which index, pooled how; reading out lists of the training split.

    python -m benchmarks.recall --output benchmarks/results/recall

An interrupted run can be resumed. The table is printed, and written to ``recall.json``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.recipe_candidates import task
from sparsight import Recipe, Sparsight
from sparsight.compression import BlockBounds, Exact, KeyIndex, LowRank, Recall
from sparsight.compression.score import Window
from sparsight.eval.evaluator import EvaluationConfig, run_evaluation, weights_digest
from sparsight.eval.result_store import ResultStore
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader import model_path
from sparsight.reader.skills import read_out

BUDGETS = (0.1, 0.05)
EVERY = (1, 2, 4, 8, 16)
INDEXES = (Exact(), LowRank(8, 4), LowRank(16, 4), LowRank(8, 8), BlockBounds(2), BlockBounds(4), BlockBounds(8))
POOLS: Sequence[Window] = (1, (1, 3), (1, 5), (1, 7), (3, 3))


def named(budget: float, every: int, index: KeyIndex, pool: Window) -> Recipe:
    """A recipe that says what it varies."""
    numbers = "".join(f" {value}" for value in vars(index).values())
    name = f"{budget:.0%}, every {every}, {index.kind}{numbers}, pool {pool}"
    return replace(Sparsight(budget), name=name, decode=Recall(every, index, pool))


def candidates() -> list[Recipe]:
    """All of them, and `sparsight` without recall."""
    plain = [replace(Sparsight(budget), name=f"{budget:.0%}, no recall") for budget in BUDGETS]
    every = [(b, e, i, p) for b in BUDGETS for e in EVERY for i in INDEXES for p in POOLS]
    return [*plain, *(named(*each) for each in every)]


def main(
    output: Annotated[Path, typer.Option()],
    records: Annotated[int, typer.Option(help="Records of a list.")] = 4,
    limit: Annotated[int, typer.Option(help="Lists.")] = 16,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Measure exact match and ROUGE-L."""
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(str(model_path()))
    model = load_model(checkpoint)
    reading = task(f"reading {records}", lambda rng: read_out(rng, "train", records))
    store = ResultStore(output, {"weights": weights_digest(model), "seed": seed, "split": "train"})
    config = EvaluationConfig([reading], candidates(), limit, seed, 16)
    run_evaluation(config, model, checkpoint.processor, store, lambda *done: print(*done))
    means = {}
    for one in config.all_recipes:
        results = store.cell(reading.label, one.to_json()).values()
        means[one.name] = {name: float(np.mean([each[name] for each in results])) for name in ("exact", "rouge_l")}
    (output / "recall.json").write_text(json.dumps({"examples": limit, "seed": seed, "means": means}, indent=1) + "\n")
    shown = Table("recipe", "exact", "rouge_l", box=None)
    for name, values in means.items():
        shown.add_row(name, *(f"{value:.3f}" for value in values.values()))
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
