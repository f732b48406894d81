"""The results of a run: every metric of every cell with its interval, and a paired test against VL-Cache."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sparsight.compression.recipe import Recipe
from sparsight.eval.evaluate import FULL, Plan
from sparsight.eval.intervals import interval, paired_p_value
from sparsight.eval.metrics import METRICS, Metric, metrics_of
from sparsight.eval.store import Figures, Store
from sparsight.eval.tasks import Task

BASELINE = "vl-cache"
"""The method that each is tested against."""

RETAINED = "retained"
"""The metric that is a task's own one over the full cache's."""


def results(plan: Plan, store: Store) -> dict[str, Any]:
    """What a finished run found, as plain data.

    Of each task: its metrics and which is its own, its examples, ``needed`` (the share of the page that the answers
    need), the full cache's figures, and a cell for each method and budget. A figure is ``value``, ``low`` and ``high``;
    of a cell also ``p_value``, None where there is nothing to test against.
    """
    return {**store.about, "examples": plan.limit, "tasks": [_task(plan, store, task) for task in plan.tasks]}


def _task(plan: Plan, store: Store, task: Task) -> dict[str, Any]:
    full = _examples(plan, store, task, FULL)
    baselines = {
        recipe.budget: _examples(plan, store, task, recipe) for recipe in plan.recipes if recipe.name == BASELINE
    }
    cells = []
    for recipe in plan.recipes:
        figures = _examples(plan, store, task, recipe)
        baseline = baselines.get(recipe.budget) if recipe.name != BASELINE else None
        metrics = _metrics(task, figures, full)
        for name, metric in METRICS.items():
            metrics[name]["p_value"] = _p_value(metric, figures, baseline)
        if RETAINED in metrics:
            metrics[RETAINED]["p_value"] = metrics[task.metric]["p_value"]
        cells.append(
            {
                "method": recipe.name,
                "budget": recipe.budget,
                "metrics": metrics,
                "by_records": by_records(figures, full, task.metric),
                "seconds": store.seconds(task.label, recipe.to_json()),
            }
        )
    in_full = _metrics(task, full, full)
    titled = {**METRICS, RETAINED: Metric(f"share of the full cache's {METRICS[task.metric].title}", RETAINED)}
    return {
        "task": task.label,
        "summary": task.summary,
        "metric": task.metric,
        "metrics": {name: asdict(titled[name]) for name in in_full},
        "examples": len(full),
        "needed": float(np.mean([figures["needed"] for figures in full])),
        "full": in_full,
        "full_seconds": store.seconds(task.label, FULL.to_json()),
        "full_by_records": by_records(full, full, task.metric),
        "cells": cells,
    }


def _examples(plan: Plan, store: Store, task: Task, recipe: Recipe) -> list[Figures]:
    held = store.cell(task.label, recipe.to_json())
    return [held[number] for number in range(plan.limit)]


def _metrics(task: Task, figures: Sequence[Figures], full: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """Every metric of some examples, and of the task's own one the share of the full cache's, if that is not 0."""
    own = METRICS[task.metric].figure
    found = {name: summary(metric, figures) for name, metric in METRICS.items()}
    if column(full, own).sum():
        found[RETAINED] = ratio(column(figures, own), column(full, own))
    return found


def _p_value(metric: Metric, figures: Sequence[Figures], baseline: Sequence[Figures] | None) -> float | None:
    """Of the paired test against the baseline, None where there is none."""
    if baseline is None:
        return None
    return paired_p_value(column(figures, metric.figure), column(baseline, metric.figure))


def column(figures: Sequence[Figures], name: str) -> np.ndarray:
    """One figure of all examples, float64 ``[N]``."""
    return np.array([example[name] for example in figures], dtype=np.float64)


def summary(metric: Metric, figures: Sequence[Figures]) -> dict[str, Any]:
    """A metric of some examples, with its interval."""
    sums = column(figures, metric.figure)
    found = ratio(sums, column(figures, metric.per) if metric.per else np.ones(len(sums)))
    return {name: math.exp(min(value, 700.0)) for name, value in found.items()} if metric.exponential else found


def ratio(sums: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """A quotient of sums over examples, with its interval."""
    low, high = interval(sums, weights)
    return {"value": float(sums.sum() / weights.sum()), "low": low, "high": high}


def by_records(figures: Sequence[Figures], full: Sequence[Figures], name: str) -> dict[str, float]:
    """The mean of a metric by the number of records on the page, where it differs; else nothing."""
    groups: dict[int, list[float]] = {}
    for example, reference in zip(figures, full, strict=True):
        groups.setdefault(reference["records"], []).append(example[METRICS[name].figure])
    if len(groups) == 1:
        return {}
    return {str(records): float(np.mean(values)) for records, values in sorted(groups.items())}


def best(task: Mapping[str, Any], metric: str, budget: float) -> float | None:
    """The best value of a metric among the methods at a budget; None where they are all the same."""
    values = [cell["metrics"][metric]["value"] for cell in task["cells"] if cell["budget"] == budget]
    if len(set(values)) < 2:
        return None
    return max(values) if metrics_of(task)[metric].higher_is_better else min(values)
