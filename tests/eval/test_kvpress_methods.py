"""kvpress's methods see the same prompts, and those with the same rule have the same logits."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsight import recipe
from sparsight.bench import kvpress
from sparsight.bench.kvpress import CannotRun, Kvpress
from sparsight.compression.recipe import Recipe
from sparsight.eval.aggregation import aggregate
from sparsight.eval.collate import text_conversations
from sparsight.eval.converse import converse
from sparsight.eval.evaluator import EvaluationConfig, run_evaluation
from sparsight.eval.kvpress_methods import KvpressMethod
from sparsight.eval.passages import TextExample
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.eval.result_store import ResultStore
from sparsight.eval.tasks import TEXT_TASKS, Task, task
from sparsight.utils.processes import cache_folder
from tests.eval.conftest import Talker

TASK = task("retrieval:30", TEXT_TASKS)


class OwnModel:
    """Follows answers with the full cache of a model here, in place of kvpress's process."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prompts: list[list[int]] = []

    def follow(self, press: str, budget: float, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, float]:
        self.prompts.append(prompt)
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0]
        return logits[len(prompt) - 1 : -1], 0.75


class Refusing:
    def follow(self, *_: Any) -> Any:
        raise CannotRun("kvpress: too short")


def config(process: Any) -> EvaluationConfig:
    recipes = [recipe("vl-cache", budget=0.2), KvpressMethod("snapkv", 0.2, process)]
    return EvaluationConfig([TASK], recipes, limit=3, seed=0, batch_size=3)


def test_prompts_and_results_are_those_of_the_other_methods(writer: Talker, tmp_path: Path) -> None:
    process = OwnModel(writer.model)
    store = ResultStore(tmp_path, {})
    run_evaluation(config(process), writer.model, writer.processor, store)
    examples = [TASK.example(0, number) for number in range(3)]
    whole = [writer.processor(example.passage + example.turns[0][0])["input_ids"] for example in examples]
    assert sorted(process.prompts) == sorted(whole)
    (report,) = aggregate(config(process), store)["tasks"]
    ours, theirs = report["cells"]
    assert (ours["method"], theirs["method"], theirs["budget"]) == ("vl-cache", "kvpress snapkv", 0.2)
    metrics = {name: metric["value"] for name, metric in theirs["metrics"].items()}
    assert metrics["divergence"] == pytest.approx(0, abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(report["full"]["perplexity"]["value"])
    assert (metrics["same_tokens"], metrics["held"]) == (1, 0.75)
    assert ours["metrics"]["divergence"]["value"] > 0.01
    assert 0.2 < ours["metrics"]["held"]["value"] < 0.4


def test_a_run_that_kvpress_stops_keeps_its_results(writer: Talker, tmp_path: Path) -> None:
    store = ResultStore(tmp_path, {})
    with pytest.raises(ValueError, match=r"^kvpress: too short\.$"):
        run_evaluation(config(Refusing()), writer.model, writer.processor, store)
    assert list(store.cell(TASK.label, recipe("vl-cache", budget=0.2).to_json())) == [0]


@pytest.fixture(scope="module")
def real(writer: Talker) -> Iterator[Kvpress]:
    if not list(cache_folder().glob(f"kvpress-{kvpress.VERSION}-*/.ready")):
        pytest.skip("sparsight eval --against kvpress has not set its environment up")
    with Kvpress.of(writer.folder, "auto", "cpu") as process:
        yield process


def average_snapkv(budget: float) -> Recipe:
    return recipe("snapkv", budget=budget, pooling="average")


def text_example(chosen: Task) -> TextExample:
    example = chosen.example(0, 0)
    assert isinstance(example, TextExample)
    return example


def streaming_without_a_decode_rule(budget: float) -> Recipe:
    return recipe("streaming-llm", budget=budget).combined(decode="grow")


@pytest.mark.parametrize("budget", [0.25, 0.4])
@pytest.mark.parametrize(
    ("press", "ours"), [("snapkv", average_snapkv), ("streaming-llm", streaming_without_a_decode_rule)]
)
def test_the_same_rule_has_the_same_logits(writer: Talker, real: Kvpress, press: str, ours: Any, budget: float) -> None:
    example = dataclasses.replace(text_example(task("continuation:60", TEXT_TASKS)), tokens=6)
    given = text_conversations(writer.processor, [example], "cpu", passage_as_vision=False)
    (one,) = converse(PrefillSnapshot(writer.model, given.inputs), ours(budget), given)
    (other,) = KvpressMethod(press, budget, real).follow(given)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-3, atol=1e-3)
    assert other.held == pytest.approx(budget, abs=0.01)


@pytest.mark.parametrize("press", ["pyramidkv", "adakv", "observed-attention", "expected-attention"])
def test_every_method_of_kvpress_runs_and_says_what_it_holds(writer: Talker, real: Kvpress, press: str) -> None:
    given = text_conversations(writer.processor, [text_example(TASK)], "cpu", passage_as_vision=False)
    (turn,) = KvpressMethod(press, 0.4, real).follow(given)
    assert turn.logits.shape == (1, given.answers[0].shape[1], writer.model.config.vocab_size)
    # Its AdaKV hides keys and keeps them.
    assert turn.held == pytest.approx(1 if press == "adakv" else 0.4, abs=0.01)
