"""What holds for every prompt, batch, budget, grouping and dtype."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight import RECIPES, CompressedCache, recipe
from sparsight.recipe import KINDS
from tests import families, models

PROMPTS = st.builds(
    models.Prompt, images=st.integers(0, 2), before=st.integers(1, 20), after=st.one_of(st.just(0), st.integers(1, 40))
)
BATCHES = st.lists(PROMPTS, min_size=1, max_size=3)
BUDGETS = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([1e-6, 0.01, 0.1, 1.0]))
any_case = given(
    prompts=BATCHES,
    name=st.sampled_from(list(RECIPES)),
    budget=BUDGETS,
    family=st.sampled_from(models.FAMILIES),
    heads=st.sampled_from(list(families.HEADS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@settings(max_examples=80, deadline=None)
@any_case
def test_the_budget_is_kept_and_so_is_the_last_token(prompts, name, budget, family, heads, dtype):
    model, inputs = models.model(family, heads, dtype), models.inputs(family, *prompts, dtype=dtype)
    cache = CompressedCache(model, recipe(name, budget=budget), inputs)
    models.generate(model, inputs, 1, past_key_values=cache)
    report = cache.report()
    for row, length in enumerate(report.prompt_tokens):
        kept = [layer[row][0] for layer in report.kept]
        assert all(1 <= count <= length for count in kept)
        # Every layer's share is rounded, by at most half an entry, and one entry stays.
        assert sum(kept) <= max(budget * length + 0.5, 1) * len(kept) + 1e-6
        for layer in range(3):
            assert inputs["input_ids"].shape[1] - 1 in cache.kept_positions(layer)[row, 0]
    cache.reset()
    assert torch.stack(models.logits(model, inputs, 4, past_key_values=cache)).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(prompts=BATCHES, name=st.sampled_from(list(RECIPES)), family=st.sampled_from(list(families.TINY)))
def test_budget_one_equals_full_cache(prompts, name, family):
    model, inputs = models.model(family), models.inputs(family, *prompts)
    cache = CompressedCache(model, recipe(name, budget=1.0), inputs)
    assert torch.equal(models.generate(model, inputs, 6, past_key_values=cache), models.generate(model, inputs, 6))


COMBINATIONS = list(itertools.product(*KINDS.values()))


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=" + ".join)
def test_any_score_goes_with_any_allocation_reduction_and_decode_rule(kinds):
    model, inputs = models.model("llava"), models.inputs("llava", models.ONE_IMAGE, models.THREE_IMAGES)
    chosen = recipe("full", budget=0.2).combined(**dict(zip(KINDS, kinds, strict=True)))
    cache = CompressedCache(model, chosen, inputs)
    logits = models.logits(model, inputs, 12, past_key_values=cache)
    assert torch.stack(logits).isfinite().all()
    report = cache.report()
    for layer in range(3):
        assert all(1 <= heads[0] <= length for heads, length in zip(report.kept[layer], [31, 65], strict=True))
    assert sum(heads[0] for layer in report.kept for heads in layer) <= 0.2 * 3 * (31 + 65) + 6
    if kinds[3] != "grow":
        held = [heads[0] for layer in report.held for heads in layer]
        assert sum(held) <= 0.2 * 3 * (31 + 65 + 2 * 11) + 6 * 5


def test_one_token_is_a_prompt():
    model = models.model("llama")
    inputs = models.inputs("llama", models.Prompt(0, 1, 0))
    for name in RECIPES:
        cache = CompressedCache(model, recipe(name, budget=0.1), inputs)
        # The one entry stays, so the answer is the full cache's as long as nothing is dropped.
        answer = models.generate(model, inputs, 2, past_key_values=cache)
        assert torch.equal(answer, models.generate(model, inputs, 2))
        assert cache.report().kept == [[[1, 1]]] * 3
