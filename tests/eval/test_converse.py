"""Conversations through a cache, in padded batches, against each row alone, token by token."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from sparsight import CompressedCache, Recipe, recipe
from sparsight.engine.engine import Engine
from sparsight.eval.converse import SPARE, Conversations, converse
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.methods import Full
from tests.support import models
from tests.support.models import PAD, Prompt

PROMPTS = (Prompt(images=1, before=5, after=9), Prompt(images=1, before=2, after=6))
QUESTIONS = [[31, 32, 33, 34, 35], [41, 42, 43]]
LENGTHS = (5, 3)
LOGITS = {"rtol": 1e-4, "atol": 1e-4}


def batch(family: str) -> Conversations:
    """Two conversations of two turns, prompts and questions of different lengths."""
    generator = torch.Generator().manual_seed(5)
    answers = [torch.randint(1, 100, (2, length), generator=generator) for length in LENGTHS]
    longest = max(map(len, QUESTIONS))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in QUESTIONS])
    return Conversations(models.inputs(family, *PROMPTS), answers, [(ids, (ids != PAD).long())])


def alone(family: str, given: Conversations, row: int) -> dict[str, Tensor]:
    """The prompt of one row without its padding."""
    inputs = given.inputs
    valid = inputs["attention_mask"][row].bool()
    single = {
        name: inputs[name][row : row + 1, valid]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in inputs
    }
    patches = inputs["pixel_values"].shape[0] // 2
    single["pixel_values"] = inputs["pixel_values"][row * patches : (row + 1) * patches]
    if "image_grid_thw" in inputs:
        single["image_grid_thw"] = inputs["image_grid_thw"][row : row + 1]
    return single


def extended(inputs: dict[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
    """Inputs with more text tokens, pixels included."""
    more = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "mm_token_type_ids": [0] * len(tokens)}
    return {
        name: torch.cat([value, torch.tensor([more[name]], dtype=value.dtype)], dim=1) if name in more else value
        for name, value in inputs.items()
    }


def by_hand(family: str, given: Conversations, row: int, chosen: Recipe | None) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the right answers' tokens and free answers, of one row; None is transformers' own cache."""
    model, inputs = models.model(family), alone(family, given, row)

    def after(texts: list[list[int]]) -> tuple[object, Tensor, dict[str, Tensor]]:
        """A new cache that has seen the prompt and pieces of text, and the logits of what is next."""
        cache = DynamicCache(config=model.config.text_config)
        if chosen is not None:
            cache = CompressedCache(model, chosen, inputs)
        seen = inputs
        (logits,) = models.logits(model, seen, 1, past_key_values=cache)
        for text in texts:
            # Pixels belong to the prompt alone.
            seen = extended({name: seen[name] for name in ("input_ids", "attention_mask")}, text)
            (logits,) = models.logits(model, seen, 1, past_key_values=cache)
        return cache, logits, seen

    pieces: list[list[int]] = []
    forced, free = [], []
    for turn, answers in enumerate(given.answers):
        if turn:
            pieces.append(QUESTIONS[row])
        answer = answers[row].tolist()
        cache, logits, seen = after(pieces)
        first = logits.argmax(-1).tolist()
        rest = extended({name: seen[name] for name in ("input_ids", "attention_mask")}, first)
        count = len(answer) + len(answer) // 4 + SPARE
        free.append(
            torch.cat([torch.tensor([first]), models.generate(model, rest, count - 1, past_key_values=cache)], 1)
        )
        steps = [after([*pieces, *([token] for token in answer[:done])])[1] for done in range(len(answer))]
        forced.append(torch.cat(steps))
        pieces += [[token] for token in answer[:-1]]
    return forced, free


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["vl-cache", "elastic", "h2o", "streaming-llm"])
def test_rows_of_a_batch_are_conversations_held_alone_token_by_token(family: str, method: str) -> None:
    given, chosen = batch(family), recipe(method, budget=0.4)
    turns = converse(PrefillSnapshot(models.model(family), given.inputs), chosen, given)
    for row in range(2):
        forced, free = by_hand(family, given, row, chosen)
        for turn, logits, tokens in zip(turns, forced, free, strict=True):
            assert_close(turn.logits[row], logits, **LOGITS)
            assert torch.equal(turn.tokens[row], tokens[0])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_full_recipe_is_transformers_own_cache(family: str) -> None:
    given = batch(family)
    turns = converse(PrefillSnapshot(models.model(family), given.inputs), Full(), given)
    for row in range(2):
        forced, free = by_hand(family, given, row, None)
        for turn, logits, tokens in zip(turns, forced, free, strict=True):
            assert_close(turn.logits[row], logits, **LOGITS)
            assert torch.equal(turn.tokens[row], tokens[0])


def test_the_full_recipe_is_one_pass_over_the_whole_conversation() -> None:
    given = batch("llava")
    turns = converse(PrefillSnapshot(models.model("llava"), given.inputs), Full(), given)
    for row in range(2):
        prompt = alone("llava", given, row)
        first, second = (answer[row].tolist() for answer in given.answers)
        whole = extended(prompt, [*first[:-1], *QUESTIONS[row], *second[:-1]])
        logits = models.model("llava")(**whole).logits[0]
        start = prompt["input_ids"].shape[1] - 1
        assert_close(turns[0].logits[row], logits[start : start + len(first)], **LOGITS)
        assert_close(turns[1].logits[row], logits[-len(second) :], **LOGITS)


@pytest.mark.parametrize("wrong", [False, True])
def test_what_is_right_to_its_end_is_not_generated_again(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = models.fresh_model("llava"), models.inputs("llava", PROMPTS[0])
    tokens = models.generate(model, inputs, 8)
    end = tokens[0].tolist().index(int(tokens[0, 3])) + 1
    model.generation_config.eos_token_id = int(tokens[0, 3])
    resumed, resume = [], Engine.resume
    monkeypatch.setattr(Engine, "resume", lambda *arguments: (resumed.append(1), resume(*arguments))[1])
    answer = tokens[:, :end].clone()
    answer[0, 0] += wrong
    (turn,) = converse(PrefillSnapshot(model, inputs), Full(), Conversations(inputs, [answer], []))
    assert torch.equal(turn.tokens, tokens[:, :end])
    assert len(resumed) == wrong


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["vl-cache", "sparsight-recall"])
def test_with_the_full_cache_in_host_memory_a_turn_begins_as_with_the_full_cache(family: str, method: str) -> None:
    given = batch(family)
    recorded = PrefillSnapshot(models.model(family), given.inputs)
    full, kept, lost = (
        converse(recorded, chosen, given, keep)
        for chosen, keep in ((Full(), None), (recipe(method, budget=0.2), "host"), (recipe(method, budget=0.2), None))
    )
    assert_close(kept[1].logits[:, 0], full[1].logits[:, 0], **LOGITS)
    assert not torch.allclose(lost[1].logits[:, 0], full[1].logits[:, 0], **LOGITS)
    assert kept[1].held < full[1].held


def test_recipes_do_not_disturb_each_other() -> None:
    given, chosen = batch("llava"), recipe("elastic", budget=0.4)
    recorded = PrefillSnapshot(models.model("llava"), given.inputs)
    before = converse(recorded, chosen, given)
    converse(recorded, recipe("h2o", budget=0.2), given)
    after = converse(recorded, chosen, given)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.tokens, other.tokens)
