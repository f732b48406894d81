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


def test_the_table_fits_eighty_columns(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["method", "score", "allocate", "reduce", "decode"]
    assert lines[1].split() == ["vl-cache", "post-vision", "sparsity", "evict", "grow"]
    assert lines[2].split() == ["elastic", "accumulated", "uniform", "merge-nearest", "fixed-point"]
    assert "arXiv 2410.23317" in " ".join(out.split())


@pytest.mark.parametrize("columns", [1, 30, 60])
def test_names_are_complete_in_a_narrow_terminal(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("methods")[1].splitlines()[1 : len(RECIPES) + 1]
    expected = [[name, *(getattr(recipe(name), role).kind for role in KINDS)] for name in RECIPES]
    assert [line.split() for line in lines] == expected
