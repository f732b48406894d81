"""A run has the results of each example alone, and an interrupted run is resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsight import CompressedCache, recipe
from sparsight.eval import evaluator
from sparsight.eval.collate import conversations, group_by_answer_length, right_answers
from sparsight.eval.evaluator import (
    FULL,
    EvaluationConfig,
    end_tokens,
    measure_pace,
    remaining_seconds,
    results_done,
    run_evaluation,
    until_end,
    weights_digest,
)
from sparsight.eval.metrics import anls, rouge_l
from sparsight.eval.result_store import CELLS, ResultStore
from sparsight.eval.tasks import task
from tests.eval.conftest import Talker

RECIPES = [recipe("vl-cache", budget=0.2), recipe("vl-cache", budget=0.6), recipe("elastic", budget=0.2)]
TASKS = [task("look-up:3"), task("conversation:2"), task("transcribe:2")]


class StopError(Exception):
    """Ends a run early."""


def config(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"tasks": TASKS, "recipes": RECIPES, "limit": 5, "seed": 0, "batch_size": 3, **changes})


def measured(
    talker: Talker, folder: Path, chosen: EvaluationConfig, on_progress: Callable[..., Any] | None = None
) -> ResultStore:
    store = ResultStore(folder, {"seed": chosen.seed})
    run_evaluation(chosen, talker.model, talker.processor, store, on_progress)
    return store


@pytest.fixture(scope="module")
def store(talker: Talker, tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    return measured(talker, tmp_path_factory.mktemp("run"), config())


def cells(
    store: ResultStore, chosen: EvaluationConfig | None = None
) -> dict[tuple[str, str, float], dict[int, dict[str, Any]]]:
    chosen = chosen or config()
    return {
        (task.label, recipe.name, recipe.budget): store.cell(task.label, recipe.to_json())
        for task in chosen.tasks
        for recipe in [FULL, *chosen.recipes]
    }


def test_every_cell_has_every_example(store: ResultStore) -> None:
    assert len(cells(store)) == 12
    assert all(sorted(examples) == [0, 1, 2, 3, 4] for examples in cells(store).values())


@pytest.mark.parametrize("chosen", [FULL, *RECIPES], ids=lambda chosen: f"{chosen.name} {chosen.budget}")
def test_the_answers_are_what_the_model_generates_for_each_example_alone(
    store: ResultStore, talker: Talker, chosen: Any
) -> None:
    for number, found in store.cell("look-up:3", chosen.to_json()).items():
        example = TASKS[0].example(0, number)
        ((question, answer),) = example.turns
        content = [{"type": "image", "image": example.pictures()[0]}, {"type": "text", "text": question}]
        inputs = talker.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        tokens = len(right_answers(talker.processor.tokenizer, example)[0])
        output = talker.model.generate(
            **inputs,
            past_key_values=CompressedCache(talker.model, chosen, inputs),
            max_new_tokens=tokens + tokens // 4 + 4,
            do_sample=False,
        )
        text = talker.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found["answers"] == [text]
        assert found["tokens"] == tokens
        assert found["exact"] == (text.strip() == answer)
        assert found["anls"] == anls(text, answer)
        assert found["rouge_l"] == rouge_l(text, answer)


def test_answers_are_compared_with_the_full_caches(store: ResultStore) -> None:
    for (label, name, budget), examples in cells(store).items():
        for number, found in examples.items():
            full = store.cell(label, FULL.to_json())[number]
            same = [one == other for one, other in zip(found["answers"], full["answers"], strict=True)]
            assert found["same_answer"] == sum(same) / len(same)
            assert (found["same_tokens"] == 1) == all(same)
            if name == "full":
                assert found["divergence"] == 0
            else:
                assert found["divergence"] > 0, (label, name, budget)


def test_a_conversation_counts_all_turns(store: ResultStore) -> None:
    for examples in (store.cell("conversation:2", chosen.to_json()) for chosen in (FULL, *RECIPES)):
        assert all(len(found["answers"]) == 2 for found in examples.values())
        # Two answers of three or four characters, each with its end.
        assert all(found["tokens"] in (8, 10) for found in examples.values())


def test_the_page_is_described_once(store: ResultStore) -> None:
    for label, records in (("look-up:3", 3), ("conversation:2", 32), ("transcribe:2", 2)):
        assert {found["records"] for found in store.cell(label, FULL.to_json()).values()} == {records}
        assert all(0 < found["needed"] < 0.2 for found in store.cell(label, FULL.to_json()).values())


def test_results_do_not_depend_on_the_batch_size(store: ResultStore, talker: Talker, tmp_path: Path) -> None:
    single = cells(measured(talker, tmp_path, config(batch_size=1)))
    for key, examples in cells(store).items():
        for number, found in examples.items():
            other = single[key][number]
            assert found["answers"] == other["answers"]
            assert found["surprisal"] == pytest.approx(other["surprisal"], rel=1e-3)
            assert found["divergence"] == pytest.approx(other["divergence"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("after", [1, 6])
def test_an_interrupted_run_is_resumed_with_the_same_results(
    store: ResultStore, talker: Talker, tmp_path: Path, after: int
) -> None:
    calls: list[int] = []

    def stop(text: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after:
            raise StopError

    with pytest.raises(StopError):
        measured(talker, tmp_path, config(), stop)
    lines = (tmp_path / CELLS).read_text().splitlines()
    assert len(lines) == after
    progress: list[tuple[int, int]] = []
    again = measured(talker, tmp_path, config(), lambda text, done, total: progress.append((done, total)))
    assert cells(again) == cells(store)
    assert (tmp_path / CELLS).read_text().splitlines()[:after] == lines
    # Earlier results count as done, and nothing is measured twice.
    measured_twice = [
        number for line in (tmp_path / CELLS).read_text().splitlines() for number in json.loads(line)["examples"]
    ]
    assert len(measured_twice) == 12 * 5
    assert progress[-1] == (60, 60)
    assert progress[0][0] > calls[-1]


def test_the_pace_is_measured_with_two_small_batches_of_each_task(talker: Talker, tmp_path: Path) -> None:
    store = ResultStore(tmp_path, {})
    assert (remaining_seconds(config(), store), results_done(config(), store)) == (0, 0)
    measure_pace(config(), talker.model, talker.processor, store)
    lines = [json.loads(line) for line in (tmp_path / CELLS).read_text().splitlines()]
    assert [(line["task"], line["recipe"]["name"], list(line["examples"])) for line in lines] == [
        (each.label, name, [str(number) for number in batch])
        for each in TASKS
        for batch in config().batches(each, talker.processor.tokenizer)[:2]
        for name in ("full", "vl-cache")
    ]
    assert lines[0]["examples"].keys() == {"0"}
    measure_pace(config(), talker.model, talker.processor, store)
    assert len((tmp_path / CELLS).read_text().splitlines()) == len(lines)


def test_every_example_is_in_one_batch_and_the_first_two_are_small(talker: Talker) -> None:
    batches = config(limit=40, batch_size=16).batches(TASKS[0], talker.processor.tokenizer)
    assert sorted(number for batch in batches for number in batch) == list(range(40))
    assert [len(batch) for batch in batches[:2]] == [1, 4]
    assert max(map(len, batches)) <= 16
    assert [list(batch) for batch in config(limit=1).batches(TASKS[0], talker.processor.tokenizer)] == [[0]]


def test_the_time_left_is_at_the_pace_of_what_was_measured(tmp_path: Path) -> None:
    store, chosen = ResultStore(tmp_path, {}), config(tasks=TASKS[:2])
    store.append(TASKS[0].label, FULL.to_json(), {0: {}, 1: {}}, 8.0)
    store.append(TASKS[0].label, RECIPES[0].to_json(), {0: {}}, 1.0)
    store.append(TASKS[1].label, FULL.to_json(), {0: {}}, 3.0)
    # Three at 4 s, four at 1 s and, with recipes that were not measured, ten more; of the second task 4 + 15 at 3 s.
    assert remaining_seconds(chosen, store) == 3 * 4 + (4 + 10) * 1 + (4 + 15) * 3


def test_batches_that_would_take_long_are_split(
    store: ResultStore, talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "STEP_SECONDS", 0)
    split = measured(talker, tmp_path, config(tasks=TASKS[:1]))
    lines = [json.loads(line)["examples"] for line in (tmp_path / CELLS).read_text().splitlines()]
    # Only the first batch is measured before there is a pace.
    assert {len(examples) for examples in lines} == {1}
    for (label, *_), examples in cells(split, config(tasks=TASKS[:1])).items():
        assert label == TASKS[0].label
        assert sorted(examples) == [0, 1, 2, 3, 4]


def test_an_example_that_has_results_is_not_measured_again_in_another_batch(talker: Talker, tmp_path: Path) -> None:
    for batch_size in (1, 3):
        chosen = config(tasks=TASKS[:1], batch_size=batch_size, limit=3 if batch_size == 1 else 6)
        measured(talker, tmp_path, chosen)
    numbers = [
        number for line in (tmp_path / CELLS).read_text().splitlines() for number in json.loads(line)["examples"]
    ]
    assert len(numbers) == 6 * 4


def test_a_finished_run_measures_nothing(store: ResultStore, talker: Talker) -> None:
    before = (store.folder / CELLS).read_bytes()
    run_evaluation(config(), None, talker.processor, store)
    assert (store.folder / CELLS).read_bytes() == before


def test_more_methods_and_examples_add_to_what_is_there(talker: Talker, tmp_path: Path) -> None:
    few = config(recipes=RECIPES[:1], limit=3, tasks=TASKS[:1])
    more = config(recipes=RECIPES[:2], limit=6, tasks=TASKS[:1])
    before = cells(measured(talker, tmp_path, few), few)
    after = cells(measured(talker, tmp_path, more), more)
    assert all(sorted(examples) == list(range(6)) for examples in after.values())
    for key, examples in before.items():
        for number, found in examples.items():
            assert after[key][number]["answers"] == found["answers"]


def test_a_batch_has_right_answers_of_the_same_length(talker: Talker) -> None:
    examples = {number: TASKS[0].example(0, number) for number in range(40)}
    found = group_by_answer_length(talker.processor.tokenizer, examples, 8)
    assert sorted(number for batch in found for number in batch) == list(range(40))
    assert all(len(batch) <= 8 for batch in found)
    assert len(found) <= 7
    assert all(len({len(examples[number].turns[0][1]) for number in batch}) == 1 for batch in found)


def test_a_conversation_in_the_models_chat_template(talker: Talker) -> None:
    example = TASKS[1].example(0, 0)
    given = conversations(talker.processor, [example], "cpu", torch.float32)
    ids = [*given.inputs["input_ids"][0].tolist(), *given.answers[0][0, :-1].tolist()]
    ids += [*given.questions[0][0][0].tolist(), *given.answers[1][0].tolist()]
    (first, one), (second, other) = example.turns
    text = talker.processor.tokenizer.decode(ids).replace("<image>", "")
    assert text == f"<s><|user|>\n{first}<|assistant|>{one}</s><|user|>{second}<|assistant|>{other}</s>"


def test_questions_of_different_lengths_are_padded_on_the_left(talker: Talker) -> None:
    examples = {number: TASKS[1].example(0, number) for number in range(20)}
    batch = max(group_by_answer_length(talker.processor.tokenizer, examples, 20), key=len)
    given = conversations(talker.processor, [examples[number] for number in batch], "cpu", torch.float32)
    ((ids, valid),) = given.questions
    assert not valid.all()
    for row, example in enumerate(examples[number] for number in batch):
        text = talker.processor.tokenizer.decode(ids[row, valid[row].bool()])
        assert text == f"</s><|user|>{example.turns[1][0]}<|assistant|>"
        assert valid[row].tolist() == sorted(valid[row].tolist())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        # Only the last message is written.
        (
            "{% if messages|length == 1 %}<image>{% endif %}{{ messages[-1].content[-1].text }}",
            "rewrites earlier turns",
        ),
    ],
)
def test_a_template_that_rewrites_turns_is_refused(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, template: str | None, message: str
) -> None:
    monkeypatch.setattr(talker.processor, "chat_template", template)
    with pytest.raises(ValueError, match=message):
        conversations(talker.processor, [TASKS[1].example(0, 0)], "cpu", torch.float32)


def test_an_answer_ends_before_its_end(talker: Talker) -> None:
    assert until_end([5, 6, 2, 7, 2], {2, 9}) == [5, 6]
    assert until_end([5, 6], {2}) == [5, 6]
    ends = end_tokens(talker.model, talker.processor.tokenizer)
    assert talker.processor.tokenizer.eos_token_id in ends


def test_different_weights_have_different_digests(talker: Talker) -> None:
    before = weights_digest(talker.model)
    assert weights_digest(talker.model) == before
    weight = talker.model.lm_head.weight
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        assert weights_digest(talker.model) != before
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1
