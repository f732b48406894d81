"""What is taken of lmms-eval's results, by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsight import recipe
from sparsight.eval.evaluator import FULL
from sparsight.eval.lmms_harness import _leaves, _task, aggregates, samples
from sparsight.eval.result_store import ResultStore
from sparsight.eval.significance import bootstrap_interval, paired_p_value

FOUND = {
    "results": {
        "docs": {
            "alias": "docs",
            "anls,none": 0.625,
            "anls_stderr,none": 0.1,
            "anls_stderr_clt,none": 0.11,
            "cider,none": 1.25,
            "cider_stderr,none": "N/A",
            "wer,none": np.float64(0.5),
            "wer_stderr,none": 0.2,
            "anls,strict": 0.0,
        }
    },
    "higher_is_better": {"docs": {"anls": True, "cider": None, "wer": False}},
    "samples": {
        "docs": [
            {"doc_id": 1, "filtered_resps": ["b"], "anls": 0.25, "cider": {"pred": "b"}, "wer": 1.0},
            {"doc_id": 0, "filtered_resps": ["a"], "anls": 1.0, "cider": {"pred": "a"}, "wer": 0.5},
        ]
    },
}


def test_a_tasks_metrics_are_its_unfiltered_figures() -> None:
    assert aggregates(FOUND, "docs") == {
        "anls": {"value": 0.625, "error": 0.1, "higher_is_better": True},
        "cider": {"value": 1.25, "error": None, "higher_is_better": True},
        "wer": {"value": 0.5, "error": 0.2, "higher_is_better": False},
    }


def test_examples_have_the_figures_that_are_numbers() -> None:
    assert samples(FOUND, "docs") == {
        0: {"answers": ["a"], "anls": 1.0, "wer": 0.5},
        1: {"answers": ["b"], "anls": 0.25, "wer": 1.0},
    }


def test_groups_of_groups_are_opened() -> None:
    assert list(_leaves({"group": {"one": object(), "inner": {"two": object()}}, "three": object()})) == [
        "one", "two", "three",
    ]  # fmt: skip


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    store = ResultStore(tmp_path, {})
    recipes = [recipe("vl-cache", budget=0.1), recipe("snapkv", budget=0.1)]
    for chosen, right in zip([FULL, *recipes], ([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]), strict=True):
        examples = {number: {"answers": ["x"], "anls": float(value)} for number, value in enumerate(right)}
        figures = {
            "anls": {"value": sum(right) / 4, "error": 0.1, "higher_is_better": True},
            # Known of all examples together only: no test, and lmms-eval's own error.
            "cider": {"value": 2.0, "error": 0.5, "higher_is_better": True},
        }
        store.append("docs", chosen.to_json(), examples, 2.0, figures)
    return _task(ResultStore(tmp_path, {}), "docs", recipes)


def test_results_have_the_form_of_the_built_in_ones(task: dict[str, Any]) -> None:
    assert (task["task"], task["metric"], task["examples"]) == ("docs", "anls", 4)
    assert task["metrics"]["anls"]["percent"] is True
    assert task["metrics"]["cider"]["percent"] is False
    low, high = bootstrap_interval(np.array([1.0, 1.0, 1.0, 0.0]), np.ones(4))
    assert task["full"]["anls"] == {"value": 0.75, "low": low, "high": high}
    assert task["full"]["cider"] == {"value": 2.0, "low": 2 - 1.96 / 2, "high": 2 + 1.96 / 2}
    assert json.loads(json.dumps(task)) == task


def test_methods_are_tested_against_vl_cache_where_examples_have_figures(task: dict[str, Any]) -> None:
    cells = {cell["method"]: cell["metrics"] for cell in task["cells"]}
    assert cells["vl-cache"]["anls"]["p_value"] is None
    expected = paired_p_value(np.array([1.0, 1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0]))
    assert cells["snapkv"]["anls"]["p_value"] == expected
    assert cells["snapkv"]["cider"]["p_value"] is None
