"""The results of a run: every metric of every cell with its interval, and a paired test against VL-Cache."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sparsight.eval.metrics import METRICS, Metric, metrics_of
from sparsight.eval.run import FULL, Plan
from sparsight.eval.stats import interval, paired_p_value
from sparsight.eval.store import Figures, Store
from sparsight.eval.tasks import Task
from sparsight.recipe import Recipe

BASELINE = "vl-cache"
"""The method that each is tested against."""

Cell = dict[str, Any]


def results(plan: Plan, store: Store) -> dict[str, Any]:
    """What a finished run found, as plain data.

    Of each task: its metrics and which is its own, its examples, ``needed`` (the share of the page that the answers
    need), the full cache's figures, and a cell for each method and budget. A figure is ``value``, ``low`` and ``high``;
    of a cell also ``p_value``, None where there is nothing to test against; ``retained`` is the task's own metric over
    the full cache's.
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
        own = baselines.get(recipe.budget) if recipe.name != BASELINE else None
        cells.append(_cell(recipe, figures, own, full, task.metric, store.seconds(task.label, recipe.to_json())))
    return {
        "task": task.label,
        "summary": task.summary,
        "metric": task.metric,
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
        "examples": len(full),
        "needed": float(np.mean([figures["needed"] for figures in full])),
        "full": {name: summary(metric, full) for name, metric in METRICS.items()},
        "full_seconds": store.seconds(task.label, FULL.to_json()),
        "full_by_records": by_records(full, full, task.metric),
        "cells": cells,
    }


def _examples(plan: Plan, store: Store, task: Task, recipe: Recipe) -> list[Figures]:
    held = store.cell(task.label, recipe.to_json())
    return [held[number] for number in range(plan.limit)]


def _cell(
    recipe: Recipe,
    figures: Sequence[Figures],
    baseline: Sequence[Figures] | None,
    full: Sequence[Figures],
    own: str,
    seconds: float,
) -> Cell:
    metrics = {}
    for name, metric in METRICS.items():
        metrics[name] = summary(metric, figures)
        metrics[name]["p_value"] = None
        if baseline is not None:
            metrics[name]["p_value"] = paired_p_value(column(figures, metric.figure), column(baseline, metric.figure))
    return {
        "method": recipe.name,
        "budget": recipe.budget,
        "metrics": metrics,
        "retained": ratio(column(figures, METRICS[own].figure), column(full, METRICS[own].figure)),
        "by_records": by_records(figures, full, own),
        "seconds": seconds,
    }


def column(figures: Sequence[Figures], name: str) -> np.ndarray:
    """One figure of all examples, float64 ``[N]``."""
    return np.array([example[name] for example in figures], dtype=np.float64)


def summary(metric: Metric, figures: Sequence[Figures]) -> dict[str, Any]:
    """A metric of some examples, with its interval."""
    sums = column(figures, metric.figure)
    found = ratio(sums, column(figures, metric.per) if metric.per else np.ones(len(sums)))
    assert found is not None
    return {name: math.exp(min(value, 700.0)) for name, value in found.items()} if metric.exponential else found


def ratio(sums: np.ndarray, weights: np.ndarray) -> dict[str, Any] | None:
    """A quotient of sums over examples with its interval; None where there is nothing to divide by."""
    if not weights.sum():
        return None
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
