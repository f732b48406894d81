"""Public benchmarks through lmms-eval, which generates requests, scores answers and aggregates metrics."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.compression.recipe import Recipe
from sparsight.eval.aggregation import BASELINE
from sparsight.eval.evaluator import FULL, OnProgress
from sparsight.eval.metrics import Metric
from sparsight.eval.result_store import ExampleResult, ResultStore
from sparsight.eval.significance import bootstrap_interval, paired_p_value


def run_harness(
    tasks: Sequence[str],
    recipes: Sequence[Recipe],
    model: Any,
    store: ResultStore,
    limit: int | None,
    include: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Evaluate what the store lacks, and return all results.

    They have the form of :func:`sparsight.eval.aggregation.aggregate`.

    Args:
        tasks: names of lmms-eval's tasks or task groups.
        recipes: methods at their budgets; the full cache is always evaluated as well.
        model: a :class:`sparsight.eval.lmms_model.LmmsModel`.
        store: where the results go.
        limit: examples per task, all if None.
        include: a folder with more tasks in lmms-eval's format.
        on_progress: called before each cell, with the numbers of cells done and in all.

    Raises:
        ValueError: lmms-eval has no task with one of the names.
    """
    with _stdout_to_stderr():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager, get_task_dict

        manager = TaskManager(include_path=str(include) if include else None)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise ValueError(f"lmms-eval has no task {unknown[0]!r}.")
        leaves = list(_leaves(get_task_dict(list(tasks), manager, "chat")))
        cells = [(task, recipe) for recipe in [FULL, *recipes] for task in leaves]
        for done, (task, chosen) in enumerate(cells, 1):
            if on_progress is not None:
                on_progress(f"{task} {chosen.name} {chosen.budget:.3g}", done - 1, len(cells))
            if not store.cell(task, chosen.to_json()):
                model.recipe = chosen
                start = time.perf_counter()
                output = simple_evaluate(
                    model=model, tasks=[task], task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=1000
                )
                seconds = time.perf_counter() - start
                store.append(task, chosen.to_json(), samples(output, task), seconds, aggregates(output, task))
    return {**store.about, "tasks": [_task(store, task, recipes) for task in leaves]}


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep lmms-eval's log out of stdout, which is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[str]:
    """Names of the tasks in nested groups."""
    for name, inside in tasks.items():
        if isinstance(inside, Mapping):
            yield from _leaves(inside)
        else:
            yield str(name)


def aggregates(output: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A task's metrics as aggregated by lmms-eval, with standard errors where it has them."""
    metrics = {}
    for key, value in output["results"][task].items():
        name, _, filtered = key.partition(",")
        if filtered != "none" or not _is_number(value) or "_stderr" in name:
            continue
        error = output["results"][task].get(f"{name}_stderr,none")
        metrics[name] = {
            "value": float(value),
            "error": float(error) if _is_number(error) else None,
            "higher_is_better": output["higher_is_better"][task].get(name) is not False,
        }
    return metrics


def samples(output: Mapping[str, Any], task: str) -> dict[int, ExampleResult]:
    """The answers and metrics of each example of a task."""
    names = aggregates(output, task)
    return {
        sample["doc_id"]: {
            "answers": sample["filtered_resps"],
            **{name: float(sample[name]) for name in names if _is_number(sample.get(name))},
        }
        for sample in output["samples"][task]
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _task(store: ResultStore, task: str, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """A task's results."""
    full = store.aggregate(task, FULL.to_json())
    percent = {
        name: all(0 <= store.aggregate(task, each.to_json())[name]["value"] <= 1 for each in [FULL, *recipes])
        for name in full
    }
    metrics = {
        name: asdict(Metric(name, name, higher_is_better=aggregate["higher_is_better"], percent=percent[name]))
        for name, aggregate in full.items()
    }
    return {
        "task": task,
        "summary": "a task of lmms-eval",
        "metric": next(iter(full)),
        "metrics": metrics,
        "examples": len(store.cell(task, FULL.to_json())),
        "full": {name: _metric(store, task, FULL, name) for name in full},
        "full_seconds": store.seconds(task, FULL.to_json()),
        "cells": [_cell(store, task, recipe, recipes, list(full)) for recipe in recipes],
    }


def _cell(
    store: ResultStore, task: str, recipe: Recipe, recipes: Sequence[Recipe], names: Sequence[str]
) -> dict[str, Any]:
    """A recipe's metrics, tested against VL-Cache at the same budget where each example has a value."""
    baseline = next((each for each in recipes if (each.name, each.budget) == (BASELINE, recipe.budget)), None)
    metrics = {}
    for name in names:
        metrics[name] = _metric(store, task, recipe, name)
        metrics[name]["p_value"] = None
        if baseline is not None and baseline is not recipe:
            own, other = _column(store, task, recipe, name), _column(store, task, baseline, name)
            if own is not None and other is not None:
                metrics[name]["p_value"] = paired_p_value(own, other)
    return {
        "method": recipe.name,
        "budget": recipe.budget,
        "metrics": metrics,
        "seconds": store.seconds(task, recipe.to_json()),
    }


def _column(store: ResultStore, task: str, recipe: Recipe, name: str) -> Any:
    """A metric of each example, if the task's metric is their mean; else None."""
    examples = store.cell(task, recipe.to_json())
    values = [examples[number].get(name) for number in sorted(examples)]
    if any(value is None for value in values):
        return None
    column = np.array(values, dtype=np.float64)
    total = store.aggregate(task, recipe.to_json())[name]["value"]
    return column if math.isclose(column.mean(), total, abs_tol=1e-6) else None


def _metric(store: ResultStore, task: str, recipe: Recipe, name: str) -> dict[str, Any]:
    """A metric with its 95 % interval: from a bootstrap over examples, or from lmms-eval's standard error."""
    given = store.aggregate(task, recipe.to_json())[name]
    column = _column(store, task, recipe, name)
    if column is not None:
        low, high = bootstrap_interval(column, np.ones(len(column)))
    else:
        margin = 1.96 * (given["error"] or 0.0)
        low, high = given["value"] - margin, given["value"] + margin
    return {"value": given["value"], "low": low, "high": high}
