"""Text tasks: results are those of the model itself, and passages can stand for images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsight import CompressedCache, recipe
from sparsight.eval import render
from sparsight.eval.aggregation import aggregate
from sparsight.eval.collate import text_conversations
from sparsight.eval.evaluator import FULL, EvaluationConfig, run_evaluation
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.eval.result_store import ResultStore
from sparsight.eval.tasks import TEXT_TASKS, task
from tests.eval.conftest import Talker

RECIPES = [recipe("vl-cache", budget=0.2), recipe("h2o", budget=0.2), recipe("elastic", budget=0.2)]
TASKS = [task(name, TEXT_TASKS) for name in ("continuation:30", "retrieval:30", "few-shot:6")]


Measure = Callable[..., tuple[EvaluationConfig, ResultStore]]


@pytest.fixture(scope="module")
def measure(writer: Talker, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    def run(**changes: Any) -> tuple[EvaluationConfig, ResultStore]:
        config = EvaluationConfig(TASKS, RECIPES, limit=3, seed=0, batch_size=2, **changes)
        store = ResultStore(tmp_path_factory.mktemp("run"), {"model": "tiny", "weights": "", "dtype": "float32"})
        run_evaluation(config, writer.model, writer.processor, store)
        return config, store

    return run


@pytest.fixture(scope="module")
def measured(measure: Measure) -> tuple[EvaluationConfig, ResultStore]:
    return measure()


@pytest.mark.parametrize("chosen", TASKS, ids=lambda chosen: chosen.name)
def test_the_full_cache_gives_the_models_own_likelihoods(
    writer: Talker, measured: tuple[EvaluationConfig, ResultStore], chosen: Any
) -> None:
    for number, found in measured[1].cell(chosen.label, FULL.to_json()).items():
        example = chosen.example(0, number)
        ((cue, right),) = example.turns
        prompt, answer = (writer.processor(text)["input_ids"] for text in (example.passage + cue, right))
        answer = answer[: example.tokens]
        logits = writer.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        likely = logits.argmax(-1).tolist()
        expected = -logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        assert found["surprisal"] == pytest.approx(expected, rel=1e-4)
        assert found["tokens"] == len(answer)
        assert found["answers"] == [writer.processor.decode(likely, skip_special_tokens=True)]
        assert (found["divergence"], found["same_tokens"]) == (0, 1)


@pytest.mark.parametrize("chosen", RECIPES, ids=lambda chosen: chosen.name)
def test_a_method_follows_the_right_answer_with_its_own_cache(
    writer: Talker, measured: tuple[EvaluationConfig, ResultStore], chosen: Any
) -> None:
    for number, found in measured[1].cell(TASKS[1].label, chosen.to_json()).items():
        example = TASKS[1].example(0, number)
        given = text_conversations(writer.processor, [example], "cpu", passage_as_vision=False)
        ids, (answer,) = given.inputs["input_ids"], given.answers
        cache = CompressedCache(writer.model, chosen, given.inputs)
        logits = [writer.model(**given.inputs, past_key_values=cache).logits[:, -1]]
        for place in range(answer.shape[1] - 1):
            position = torch.tensor([[ids.shape[1] + place]])
            token = answer[:, place, None]
            logits.append(writer.model(token, past_key_values=cache, position_ids=position).logits[:, -1])
        chances = torch.cat(logits).log_softmax(-1)
        assert found["surprisal"] == pytest.approx(-chances[range(len(chances)), answer[0]].sum().item(), rel=1e-4)
        assert found["exact"] == float(chances.argmax(-1).tolist() == answer[0].tolist())
        assert found["divergence"] > 0


def test_a_passage_can_stand_for_an_image(writer: Talker) -> None:
    examples = [TASKS[1].example(0, number) for number in range(3)]
    lengths = [len(writer.processor(example.passage)["input_ids"]) for example in examples]
    cues = [len(example.turns[0][0]) for example in examples]
    for marked in (False, True):
        given = text_conversations(writer.processor, examples, "cpu", passage_as_vision=marked)
        snapshot = PrefillSnapshot(writer.model, given.inputs)
        assert snapshot.prompt.vision_mask.sum(1).tolist() == (lengths if marked else [0, 0, 0])
        queries = [span.stop - span.post_vision for span in snapshot.prompt.spans]
        assert queries == (cues if marked else [32, 32, 32])


def test_methods_that_look_at_vision_tokens_differ_where_the_passage_is_marked(
    measured: tuple[EvaluationConfig, ResultStore], measure: Measure
) -> None:
    _, marked = measure(passage_as_vision=True)
    for chosen, differs in ((RECIPES[0], True), (RECIPES[1], False)):
        label = TASKS[0].label
        one, other = (store.cell(label, chosen.to_json())[0] for store in (measured[1], marked))
        assert (one["surprisal"] != pytest.approx(other["surprisal"], rel=1e-5)) == differs


def test_a_task_has_the_metrics_that_mean_something(
    measured: tuple[EvaluationConfig, ResultStore], tmp_path: Path
) -> None:
    report = aggregate(*measured)
    names = {task["task"]: list(task["metrics"]) for task in report["tasks"]}
    common = ["perplexity", "divergence", "same_tokens", "held"]
    assert names["continuation:30"] == common
    # Relative to the full cache's, unless that is 0.
    assert [name for name in names["few-shot:6"] if name != "retained"] == ["exact", *common]
    assert not any("needed" in task for task in report["tasks"])
    written = {path.name for path in render.write(report, tmp_path)}
    assert written == {"results.json", "report.md", "report.html", "accuracy.png", "perplexity.png", "divergence.png"}
    assert "patches" not in (tmp_path / "report.md").read_text()
    assert [headline.partition(":")[0] for headline, _ in render.tables(report)] == [
        "continuation", "retrieval", "few-shot"
    ]  # fmt: skip
