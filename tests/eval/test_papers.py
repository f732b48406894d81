"""Papers' tables: what the papers' text says about them, and what was measured beside them."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsight.eval.papers import PAPERS, cells, checkpoints, command, load_paper, read_measured
from sparsight.methods import RECIPES


def value(found: list[dict[str, Any]], model: str, benchmark: str, method: str, budget: float) -> float:
    (cell,) = [
        cell
        for cell in found
        if (cell["model"], cell["benchmark"], cell["method"], cell["budget"]) == (model, benchmark, method, budget)
    ]
    return cell["value"]


@pytest.mark.parametrize("name", PAPERS)
def test_every_cell_has_a_source_and_a_method_that_can_be_measured(name: str) -> None:
    found = list(cells(load_paper(name), {}))
    assert found
    for cell in found:
        assert cell["paper"] and cell["arxiv"] and cell["table"]
        assert cell["method"] in RECIPES and 0 < cell["budget"] <= 1 and cell["ours"] is None
        assert (cell["budget"] == 1) == (cell["method"] == "full")


@pytest.mark.parametrize(
    ("model", "benchmark", "share"),
    [
        # Abstract and section 4.2: accuracy at 5 % over that of the full cache.
        ("LLaVA-NeXT-Mistral-7B", "VizWiz", 99.2),
        ("LLaVA-NeXT-Mistral-7B", "TextVQA", 97.4),
        ("Qwen3-VL-4B-Instruct", "DocVQA", 93.3),
        ("Qwen3-VL-4B-Instruct", "VizWiz", 92.1),
    ],
)
def test_tgv_kv_keeps_what_its_paper_says(model: str, benchmark: str, share: float) -> None:
    found = list(cells(load_paper("tgv-kv"), {}))
    kept = value(found, model, benchmark, "tgv-kv", 0.05) / value(found, model, benchmark, "full", 1.0)
    assert round(100 * kept, 1) == share


def test_tgv_kv_is_ahead_of_streaming_llm_by_what_its_paper_says() -> None:
    found = list(cells(load_paper("tgv-kv"), {}))
    ours, other = (value(found, "LLaVA-1.5-7B", "TextCaps", name, 0.1) for name in ("tgv-kv", "streaming-llm"))
    assert round(100 * (ours / other - 1), 1) == 57.4


def test_the_tables_are_complete() -> None:
    found = list(cells(load_paper("tgv-kv"), {}))
    # The full cache once and six methods at every budget.
    assert len(found) == 5 * 4 * (1 + 6 * 4) + 2 * 2 * (1 + 6 * 3)
    assert len({json.dumps(cell) for cell in found}) == len(found)


def test_the_command_measures_every_cell_of_a_checkpoint(tmp_path: Path) -> None:
    paper = load_paper("tgv-kv")
    assert command(paper, "llava-hf/llava-1.5-7b-hf", tmp_path) == (
        "sparsight eval --harness lmms-eval --model llava-hf/llava-1.5-7b-hf "
        "--tasks chartqa,docvqa_val,vizwiz_vqa_val,textvqa_val,textcaps_val,coco2017_cap_val "
        "--methods streaming-llm,snapkv,h2o,elastic,prefixkv,tgv-kv --budgets 0.05,0.1,0.2,0.5 --limit 10000 "
        f"--output {tmp_path}/llava-1.5-7b-hf"
    )
    assert len(checkpoints(paper)) == 5


def results(model: str) -> dict[str, Any]:
    """Results of ``sparsight eval --harness lmms-eval``, as far as they are read."""
    cell = {"method": "snapkv", "budget": 0.1, "metrics": {"anls": {"value": 0.5}}}
    return {
        "model": model,
        "tasks": [{"task": "docvqa_val", "full": {"anls": {"value": 0.75}}, "cells": [cell]}],
    }


def test_what_was_measured_stands_beside_the_papers_value(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "results.json").write_text(json.dumps(results("llava-hf/llava-1.5-7b-hf")))
    found = list(cells(load_paper("tgv-kv"), read_measured(tmp_path)))
    ours = {(cell["model"], cell["method"], cell["budget"]): cell["ours"] for cell in found if cell["ours"] is not None}
    assert ours == {("LLaVA-1.5-7B", "full", 1.0): 75.0, ("LLaVA-1.5-7B", "snapkv", 0.1): 50.0}


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"The results in .*one/results\.json are damaged\."):
        read_measured(tmp_path)
