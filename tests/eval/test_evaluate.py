"""A run: the figures are those of each example alone, and a stopped run goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsight import CompressedCache, recipe
from sparsight.eval.evaluate import FULL, Plan, cut, end_tokens, run, weights_digest
from sparsight.eval.example_batches import answer_tokens, batches, conversations
from sparsight.eval.metrics import anls, rouge_l
from sparsight.eval.store import CELLS, Store
from sparsight.eval.tasks import task
from tests.eval.conftest import Talker

RECIPES = [recipe("vl-cache", budget=0.2), recipe("vl-cache", budget=0.6), recipe("elastic", budget=0.2)]
TASKS = [task("look-up:3"), task("conversation:2"), task("transcribe:2")]


class StopError(Exception):
    """Somebody pulls the plug."""


def plan(**changes: Any) -> Plan:
    return Plan(**{"tasks": TASKS, "recipes": RECIPES, "limit": 5, "seed": 0, "batch": 3, **changes})


def measured(talker: Talker, folder: Path, chosen: Plan, on_progress: Callable[..., Any] | None = None) -> Store:
    store = Store(folder, {"seed": chosen.seed})
    run(chosen, talker.model, talker.processor, store, on_progress)
    return store


@pytest.fixture(scope="module")
def store(talker: Talker, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return measured(talker, tmp_path_factory.mktemp("run"), plan())


def cells(store: Store, chosen: Plan | None = None) -> dict[tuple[str, str, float], dict[int, dict[str, Any]]]:
    chosen = chosen or plan()
    return {
        (task.label, recipe.name, recipe.budget): store.cell(task.label, recipe.to_json())
        for task in chosen.tasks
        for recipe in [FULL, *chosen.recipes]
    }


def test_every_cell_has_every_example(store: Store) -> None:
    assert len(cells(store)) == 12
    assert all(sorted(examples) == [0, 1, 2, 3, 4] for examples in cells(store).values())


@pytest.mark.parametrize("chosen", [FULL, *RECIPES], ids=lambda chosen: f"{chosen.name} {chosen.budget}")
def test_the_answers_are_what_the_model_generates_for_each_example_alone(
    store: Store, talker: Talker, chosen: Any
) -> None:
    for number, found in store.cell("look-up:3", chosen.to_json()).items():
        example = TASKS[0].example(0, number)
        ((question, answer),) = example.turns
        content = [{"type": "image", "image": example.pictures()[0]}, {"type": "text", "text": question}]
        inputs = talker.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        tokens = len(answer_tokens(talker.processor.tokenizer, answer))
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


def test_loyalty_is_to_the_full_cache(store: Store) -> None:
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


def test_a_conversation_counts_all_turns(store: Store) -> None:
    for examples in (store.cell("conversation:2", chosen.to_json()) for chosen in (FULL, *RECIPES)):
        assert all(len(found["answers"]) == 2 for found in examples.values())
        # Two answers of three or four characters, each with its end.
        assert all(found["tokens"] in (8, 10) for found in examples.values())


def test_the_page_is_described_once(store: Store) -> None:
    for label, records in (("look-up:3", 3), ("conversation:2", 32), ("transcribe:2", 2)):
        assert {found["records"] for found in store.cell(label, FULL.to_json()).values()} == {records}
        assert all(0 < found["needed"] < 0.2 for found in store.cell(label, FULL.to_json()).values())


def test_batches_do_not_matter(store: Store, talker: Talker, tmp_path: Path) -> None:
    single = cells(measured(talker, tmp_path, plan(batch=1)))
    for key, examples in cells(store).items():
        for number, found in examples.items():
            other = single[key][number]
            assert found["answers"] == other["answers"]
            assert found["surprisal"] == pytest.approx(other["surprisal"], rel=1e-3)
            assert found["divergence"] == pytest.approx(other["divergence"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("after", [1, 6])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(
    store: Store, talker: Talker, tmp_path: Path, after: int
) -> None:
    calls: list[int] = []

    def stop(text: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after:
            raise StopError

    with pytest.raises(StopError):
        measured(talker, tmp_path, plan(), stop)
    lines = (tmp_path / CELLS).read_text().splitlines()
    assert len(lines) == after
    progress: list[tuple[int, int]] = []
    again = measured(talker, tmp_path, plan(), lambda text, done, total: progress.append((done, total)))
    assert cells(again) == cells(store)
    assert (tmp_path / CELLS).read_text().splitlines()[:after] == lines
    # What was done counts, and nothing is done twice.
    measured_twice = [
        number for line in (tmp_path / CELLS).read_text().splitlines() for number in json.loads(line)["examples"]
    ]
    assert len(measured_twice) == 12 * 5
    assert progress[-1] == (60, 60)
    assert progress[0][0] > calls[-1]


def test_a_finished_run_does_nothing(store: Store, talker: Talker) -> None:
    before = (store.folder / CELLS).read_bytes()
    run(plan(), None, talker.processor, store)
    assert (store.folder / CELLS).read_bytes() == before


def test_more_methods_and_examples_add_to_what_is_there(talker: Talker, tmp_path: Path) -> None:
    few = plan(recipes=RECIPES[:1], limit=3, tasks=TASKS[:1])
    more = plan(recipes=RECIPES[:2], limit=6, tasks=TASKS[:1])
    before = cells(measured(talker, tmp_path, few), few)
    after = cells(measured(talker, tmp_path, more), more)
    assert all(sorted(examples) == list(range(6)) for examples in after.values())
    for key, examples in before.items():
        for number, found in examples.items():
            assert after[key][number]["answers"] == found["answers"]


def test_a_batch_has_right_answers_of_the_same_length(talker: Talker) -> None:
    examples = {number: TASKS[0].example(0, number) for number in range(40)}
    found = batches(talker.processor.tokenizer, examples, 8)
    assert sorted(number for batch in found for number in batch) == list(range(40))
    assert all(len(batch) <= 8 for batch in found)
    assert len(found) <= 7
    assert all(len({len(examples[number].turns[0][1]) for number in batch}) == 1 for batch in found)


def test_a_conversation_in_the_models_words(talker: Talker) -> None:
    example = TASKS[1].example(0, 0)
    given = conversations(talker.processor, [example], "cpu", torch.float32)
    ids = [*given.inputs["input_ids"][0].tolist(), *given.answers[0][0, :-1].tolist()]
    ids += [*given.questions[0][0][0].tolist(), *given.answers[1][0].tolist()]
    (first, one), (second, other) = example.turns
    text = talker.processor.tokenizer.decode(ids).replace("<image>", "")
    assert text == f"<s><|user|>\n{first}<|assistant|>{one}</s><|user|>{second}<|assistant|>{other}</s>"


def test_questions_of_different_lengths_are_padded_on_the_left(talker: Talker) -> None:
    examples = {number: TASKS[1].example(0, number) for number in range(20)}
    batch = max(batches(talker.processor.tokenizer, examples, 20), key=len)
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
def test_a_template_that_cannot_go_on_is_refused(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, template: str | None, message: str
) -> None:
    monkeypatch.setattr(talker.processor, "chat_template", template)
    with pytest.raises(ValueError, match=message):
        conversations(talker.processor, [TASKS[1].example(0, 0)], "cpu", torch.float32)


def test_an_answer_ends_before_its_end(talker: Talker) -> None:
    assert cut([5, 6, 2, 7, 2], {2, 9}) == [5, 6]
    assert cut([5, 6], {2}) == [5, 6]
    ends = end_tokens(talker.model, talker.processor.tokenizer)
    assert talker.processor.tokenizer.eos_token_id in ends


def test_the_digest_tells_weights_apart(talker: Talker) -> None:
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
