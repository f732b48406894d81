"""A local lmms-eval task gives the same results as the built-in evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsight.eval.lmms_harness import run_harness
from sparsight.eval.result_store import ResultStore
from sparsight.eval.tasks import task

pytest.importorskip("lmms_eval")

LIMIT = 4
YAML = """
task: pages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function pages.to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 9
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
  - metric: anls
    aggregation: mean
    higher_is_better: true
"""
PYTHON = """
from PIL import Image


def to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
OPTIONS = ("--methods", "vl-cache,snapkv", "--budgets", "0.1", "--limit", str(LIMIT), "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task in lmms-eval's own format: the first look-ups of a seed, as pictures and JSON lines."""
    folder = tmp_path_factory.mktemp("pages")
    lines = []
    for number in range(LIMIT + 2):
        example = task("look-up:16").example(5, number)
        picture = folder / f"{number}.png"
        example.pictures()[0].save(picture)
        ((question, answer),) = example.turns
        lines.append(json.dumps({"image": str(picture), "question": question, "answer": answer}) + "\n")
    (folder / "pages.jsonl").write_text("".join(lines))
    (folder / "pages.yaml").write_text(YAML.format(data=folder / "pages.jsonl"))
    (folder / "pages.py").write_text(PYTHON)
    return folder


def test_lmms_eval_finds_what_the_built_in_evaluation_finds(
    folder: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_json(*arguments: object) -> Any:
        # lmms-eval talks on stderr.
        code, out, _ = run(*arguments, "--json")
        assert code == 0
        return json.loads(out)

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = run_json(
        "eval", "--harness", "lmms-eval", "--include", folder, "--tasks", "pages", *OPTIONS, "--batch", 3,
        "--output", tmp_path / "theirs",
    )  # fmt: skip
    ours = run_json("eval", "--tasks", "look-up:16", "--seed", 5, *OPTIONS, "--output", tmp_path / "ours")
    (their_task,), (our_task,) = theirs["tasks"], ours["tasks"]
    assert their_task["examples"] == our_task["examples"] == LIMIT
    for name, figure in their_task["full"].items():
        assert figure == our_task["full"][{"exact_match": "exact", "anls": "anls"}[name]]
    assert our_task["full"]["exact"]["value"] > 0.5
    for theirs_cell, ours_cell in zip(their_task["cells"], our_task["cells"], strict=True):
        assert (theirs_cell["method"], theirs_cell["budget"]) == (ours_cell["method"], ours_cell["budget"])
        assert theirs_cell["metrics"]["exact_match"] == ours_cell["metrics"]["exact"]
        assert theirs_cell["metrics"]["anls"] == ours_cell["metrics"]["anls"]
    # A second run has nothing left to do.
    lines = (tmp_path / "theirs" / "cells.jsonl").read_bytes()
    again = run_json(
        "eval", "--harness", "lmms-eval", "--include", folder, "--tasks", "pages", *OPTIONS, "--batch", 3,
        "--output", tmp_path / "theirs",
    )  # fmt: skip
    assert again == theirs
    assert (tmp_path / "theirs" / "cells.jsonl").read_bytes() == lines


def test_a_task_that_lmms_eval_does_not_have_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lmms-eval has no task 'pagez'\."):
        run_harness(["pages", "pagez"], [], None, ResultStore(tmp_path, {}), 2, folder)


def test_lmms_eval_knows_the_model_by_name() -> None:
    from lmms_eval.models import get_model

    from sparsight.eval.lmms_model import LmmsModel

    assert get_model("sparsight") is LmmsModel


def test_generation_is_what_a_task_asks_for() -> None:
    from sparsight.eval.lmms_model import generation_options, truncate_at_stop

    assert generation_options({"max_new_tokens": 9, "temperature": 0, "do_sample": False, "until": ["x"]}) == {
        "max_new_tokens": 9, "num_beams": 1, "do_sample": False,
    }  # fmt: skip
    assert generation_options({"temperature": 0.7, "top_p": 0.9}) == {
        "max_new_tokens": 1024, "num_beams": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9,
    }  # fmt: skip
    assert truncate_at_stop("one.two;three", [";", "."]) == "one"
    assert truncate_at_stop("one", "") == truncate_at_stop("one\n\ntwo", "\n\n") == "one"
