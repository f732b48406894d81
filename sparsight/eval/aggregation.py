"""A run's results: metrics of every task and recipe with confidence intervals, and a paired test against VL-Cache."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sparsight.eval.evaluator import FULL, EvaluationConfig, Method
from sparsight.eval.metrics import METRICS, Metric, metrics_of
from sparsight.eval.result_store import ExampleResult, ResultStore
from sparsight.eval.significance import bootstrap_interval, paired_p_value
from sparsight.eval.tasks import Task

BASELINE = "vl-cache"
"""The method that the others are tested against."""

RETAINED = "retained"
"""The task's main metric divided by the full cache's."""


def aggregate(config: EvaluationConfig, store: ResultStore) -> dict[str, Any]:
    """The results of a finished run as plain data.

    Each task has its metrics and the name of the main one, the number of examples, ``needed`` (the fraction of the
    images' patches that the answers need), the metrics of the full cache, and a cell for each method and budget. A
    metric is ``value``, ``low`` and ``high``; in a cell also ``p_value``, None where there is no baseline to test
    against. Tasks without images have no ``needed``.
    """
    return {**store.about, "examples": config.limit, "tasks": [_task(config, store, task) for task in config.tasks]}


def _task(config: EvaluationConfig, store: ResultStore, task: Task) -> dict[str, Any]:
    full = _examples(config, store, task, FULL)
    baselines = {
        recipe.budget: _examples(config, store, task, recipe) for recipe in config.recipes if recipe.name == BASELINE
    }
    cells = []
    for recipe in config.recipes:
        examples = _examples(config, store, task, recipe)
        baseline = baselines.get(recipe.budget) if recipe.name != BASELINE else None
        metrics = _metrics(task, examples, full)
        for name in task.metrics:
            metrics[name]["p_value"] = _p_value(METRICS[name], examples, baseline)
        if RETAINED in metrics:
            metrics[RETAINED]["p_value"] = metrics[task.metric]["p_value"]
        cells.append(
            {
                "method": recipe.name,
                "budget": recipe.budget,
                "metrics": metrics,
                "by_records": by_records(examples, full, task.metric),
                "seconds": store.seconds(task.label, recipe.to_json()),
            }
        )
    full_metrics = _metrics(task, full, full)
    titled = {**METRICS, RETAINED: Metric(f"{METRICS[task.metric].title} relative to the full cache", RETAINED)}
    return {
        "task": task.label,
        "summary": task.summary,
        "metric": task.metric,
        "metrics": {name: asdict(titled[name]) for name in full_metrics},
        "examples": len(full),
        **({"needed": float(column(full, "needed").mean())} if "needed" in full[0] else {}),
        "full": full_metrics,
        "full_seconds": store.seconds(task.label, FULL.to_json()),
        "full_by_records": by_records(full, full, task.metric),
        "cells": cells,
    }


def _examples(config: EvaluationConfig, store: ResultStore, task: Task, recipe: Method) -> list[ExampleResult]:
    cell = store.cell(task.label, recipe.to_json())
    return [cell[number] for number in range(config.limit)]


def _metrics(task: Task, examples: Sequence[ExampleResult], full: Sequence[ExampleResult]) -> dict[str, dict[str, Any]]:
    """Every metric, and the main one relative to the full cache's if it is a share that is not 0."""
    main = METRICS[task.metric].figure
    metrics = {name: metric_with_interval(METRICS[name], examples) for name in task.metrics}
    if METRICS[task.metric].percent and column(full, main).sum():
        metrics[RETAINED] = ratio(column(examples, main), column(full, main))
    return metrics


def _p_value(
    metric: Metric, examples: Sequence[ExampleResult], baseline: Sequence[ExampleResult] | None
) -> float | None:
    """P-value of the paired test against the baseline; None without one."""
    if baseline is None:
        return None
    return paired_p_value(column(examples, metric.figure), column(baseline, metric.figure))


def column(examples: Sequence[ExampleResult], name: str) -> np.ndarray:
    """One value of every example, float64 ``[N]``."""
    return np.array([example[name] for example in examples], dtype=np.float64)


def metric_with_interval(metric: Metric, examples: Sequence[ExampleResult]) -> dict[str, Any]:
    """A metric over examples as ``value``, ``low`` and ``high``."""
    sums = column(examples, metric.figure)
    found = ratio(sums, column(examples, metric.per) if metric.per else np.ones(len(sums)))
    return {name: math.exp(min(value, 700.0)) for name, value in found.items()} if metric.exponential else found


def ratio(sums: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """A ratio of sums over examples as ``value``, ``low`` and ``high``."""
    low, high = bootstrap_interval(sums, weights)
    return {"value": float(sums.sum() / weights.sum()), "low": low, "high": high}


def by_records(examples: Sequence[ExampleResult], full: Sequence[ExampleResult], name: str) -> dict[str, float]:
    """The mean of a metric by the number of records on the page; empty if it is the same for all examples."""
    groups: dict[int, list[float]] = {}
    for example, reference in zip(examples, full, strict=True):
        groups.setdefault(reference.get("records", 0), []).append(example[METRICS[name].figure])
    if len(groups) == 1:
        return {}
    return {str(records): float(np.mean(values)) for records, values in sorted(groups.items())}


def best(task: Mapping[str, Any], metric: str, budget: float) -> float | None:
    """The best value of a metric among the methods at a budget; None if all values are equal."""
    values = [cell["metrics"][metric]["value"] for cell in task["cells"] if cell["budget"] == budget]
    if len(set(values)) < 2:
        return None
    return max(values) if metrics_of(task)[metric].higher_is_better else min(values)
