"""``sparsight.generate``: the tokens of ``model.generate`` with a compressed cache, whatever runs the decode steps."""

import pytest
import torch

import sparsight
from sparsight import CompressedCache, Engine, VLCache
from tests.support.families import TINY
from tests.support.models import (
    NO_IMAGE,
    NO_TEXT_AFTER,
    ONE_IMAGE,
    TEXT_ONLY,
    THREE_IMAGES,
    fresh_model,
    inputs,
    model,
)
from tests.support.recipes import recipe_for

TOKENS = 9
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures the decode steps")


@pytest.fixture
def resumed(monkeypatch):
    """The prompts that engines have been given."""
    prompts, resume = [], Engine.resume

    def spy(self, prompt, params):
        prompts.append(prompt)
        return resume(self, prompt, params)

    monkeypatch.setattr(Engine, "resume", spy)
    return prompts


def both(tiny, given, chosen, tokens=TOKENS, **options):
    """The output of ``model.generate`` with a cache, and of ``sparsight.generate``."""
    cache = CompressedCache(tiny, chosen, given)
    theirs = tiny.generate(**given, past_key_values=cache, max_new_tokens=tokens, **options)
    return theirs, sparsight.generate(tiny, given, chosen, max_new_tokens=tokens, **options)


@on_the_cpu
@pytest.mark.parametrize("family", [*TINY, *TEXT_ONLY])
def test_every_family_has_the_tokens_of_model_generate(family):
    prompts = (ONE_IMAGE, NO_IMAGE) if family in TINY else (NO_IMAGE, NO_IMAGE)
    theirs, ours = both(model(family), inputs(family, *prompts), VLCache(0.3))
    assert ours.equal(theirs)


@on_the_cpu
@pytest.mark.parametrize("method", sparsight.RECIPES)
def test_a_padded_batch_of_every_method_decodes_on_the_engine(method, resumed):
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE, NO_TEXT_AFTER, THREE_IMAGES)
    theirs, ours = both(tiny, given, recipe_for(tiny, method, **({} if method == "full" else {"budget": 0.2})))
    assert ours.equal(theirs)
    assert len(resumed) == 3


@on_the_cpu
def test_answers_that_end_early_are_padded(resumed):
    tiny, given = fresh_model("llava"), inputs("llava", ONE_IMAGE, NO_IMAGE, THREE_IMAGES)
    free, _ = both(tiny, given, VLCache(0.3))
    end = int(free[1, given["input_ids"].shape[1] + 2])
    for ends in (end, [end, int(free[0, -1])]):
        theirs, ours = both(tiny, given, VLCache(0.3), eos_token_id=ends, repetition_penalty=1.3)
        assert ours.equal(theirs)
        theirs, ours = both(tiny, given, VLCache(0.3), eos_token_id=ends)
        assert ours.equal(theirs)
        assert (ours[1, -1] == tiny.generation_config.pad_token_id).all()
    assert len(resumed) == 3 * 5


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.5},
        {"min_new_tokens": 9},
        {"no_repeat_ngram_size": 2},
    ],
    ids=" ".join,
)
def test_all_else_is_left_to_the_model(options, resumed):
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE, NO_IMAGE)
    torch.manual_seed(1)
    cache = CompressedCache(tiny, VLCache(0.3), given)
    theirs = tiny.generate(**given, past_key_values=cache, max_new_tokens=TOKENS, **options)
    torch.manual_seed(1)
    assert sparsight.generate(tiny, given, VLCache(0.3), max_new_tokens=TOKENS, **options).equal(theirs)
    assert not resumed


def test_an_assistant_is_left_to_the_model(resumed):
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE)
    theirs, ours = both(tiny, given, VLCache(1.0), assistant_model=tiny)
    assert ours.equal(theirs)
    assert not resumed
