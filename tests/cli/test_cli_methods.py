import json
from collections.abc import Callable
from typing import Any

import pytest

from sparsight import RECIPES, recipe
from sparsight.compression.recipe import KINDS


def test_json_holds_every_recipe_and_its_paper(run_json: Callable[..., Any]) -> None:
    listed = {method["name"]: method for method in run_json("methods")}
    assert list(listed) == list(RECIPES)
    for name, method in listed.items():
        assert {role: method[role] for role in KINDS} == {
            role: json.loads(recipe(name).to_json())[role] for role in KINDS
        }
        assert method["budget"] == recipe(name).budget
    assert listed["vl-cache"]["citation"] == (
        "Tu, Vashchilenko, Lu, Xu: VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language "
        "Model Inference Acceleration, arXiv 2410.23317"
    )
    assert listed["elastic"]["citation"].endswith("ECCV 2024, arXiv 2407.18121")
    assert listed["elastic"]["summary"].startswith("Elastic Cache: ")


def test_methods_are_grouped_by_what_they_need_and_add_to_the_prefill(run_json: Callable[..., Any]) -> None:
    groups = {
        (tuple(method["needs"]), method["prefill"]["queries"], method["prefill"]["passes"]): set()
        for method in run_json("methods")
    }
    for method in run_json("methods"):
        prefill = method["prefill"]
        groups[tuple(method["needs"]), prefill["queries"], prefill["passes"]].add(method["name"])
    assert groups[("question",), "last", 1] >= {"vl-cache", "snapkv", "aircache", "mixkv", "sparsight"}
    assert groups[("question", "calibration"), "last", 1] == {"sparsemm"}
    assert groups[("question",), "all", 1] == {"tgv-kv"}
    assert groups[(), "all", 1] == {"elastic", "h2o", "prefixkv", "look-m", "expected-attention"}
    assert groups[(), "none", 1] == {"streaming-llm", "infinipot-v", "random", "full"}
    assert groups[(), "none", 2] == {"kvzip"}


def test_json_says_which_prefills_can_be_bounded(run_json: Callable[..., Any]) -> None:
    bounded = {method["name"]: method["prefill"]["bounded"] for method in run_json("methods")}
    # It merges, processes the prompt twice, knows its window at the end, sums as it goes.
    assert [bounded[name] for name in ("elastic", "kvzip", "aircache", "h2o")] == ["no", "no", "at once", "chunks"]


def test_the_tables_fit_eighty_columns(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Needs nothing but the prompt; the prefill observes every query"
    assert lines[1].split() == ["method", "score", "allocate", "reduce", "decode", "bounded"]
    assert lines[2].split() == ["elastic", "accumulated", "uniform", "merge-nearest", "fixed-point", "no"]
    assert "arXiv 2410.23317" in " ".join(out.split())


@pytest.mark.parametrize("columns", [1, 30, 60])
def test_names_are_complete_in_a_narrow_terminal(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [line.split()[:5] for line in run("methods")[1].splitlines()]
    for name in RECIPES:
        assert [name, *(getattr(recipe(name), role).kind for role in KINDS)] in rows
