"""What holds for every prompt, batch, budget, grouping and dtype."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight import RECIPES, CompressedCache, Recipe
from sparsight.compression import Reconstruction, VisualHeads
from sparsight.compression.recipe import KINDS
from tests.support import families, models
from tests.support.recipes import INSTRUCTIONS, head_scores, recipe_for

PROMPTS = st.builds(
    models.Prompt,
    images=st.integers(0, 2),
    before=st.one_of(st.integers(1, 20), st.integers(1, 500)),
    after=st.one_of(st.just(0), st.integers(1, 40)),
)
"""1 to more than 600 tokens."""

BATCHES = st.lists(PROMPTS, min_size=1, max_size=3)
BUDGETS = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([1e-6, 0.01, 0.1, 1.0]))
any_case = given(
    prompts=BATCHES,
    name=st.sampled_from([name for name in RECIPES if name != "full"]),
    budget=BUDGETS,
    family=st.sampled_from(models.FAMILIES),
    heads=st.sampled_from(list(families.HEADS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@settings(max_examples=80, deadline=None)
@any_case
def test_the_budget_is_kept_and_so_is_the_last_token(prompts, name, budget, family, heads, dtype):
    model, inputs = models.model(family, heads, dtype), models.inputs(family, *prompts, dtype=dtype)
    cache = CompressedCache(model, recipe_for(model, name, budget=budget), inputs)
    models.generate(model, inputs, 1, past_key_values=cache)
    report = cache.report()
    for row, length in enumerate(report.prompt_tokens):
        kept = [count for layer in report.kept for count in layer[row]]
        assert all(1 <= count <= length for count in kept)
        # Every head's share is rounded, and one entry stays.
        assert sum(kept) <= (budget * length + 1) * len(kept)
        for layer in range(3):
            last = inputs["input_ids"].shape[1] - 1
            assert (cache.kept_positions(layer)[row] == last).any(-1).all()
    cache.reset()
    assert torch.stack(models.logits(model, inputs, 4, past_key_values=cache)).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(prompts=BATCHES, name=st.sampled_from(list(RECIPES)), family=st.sampled_from(list(families.TINY)))
def test_budget_one_equals_full_cache(prompts, name, family):
    model, inputs = models.model(family), models.inputs(family, *prompts)
    cache = CompressedCache(model, recipe_for(model, name, budget=1.0), inputs)
    assert torch.equal(models.generate(model, inputs, 6, past_key_values=cache), models.generate(model, inputs, 6))


COMBINATIONS = list(itertools.product(*KINDS.values()))


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=" + ".join)
def test_any_score_goes_with_any_allocation_reduction_and_decode_rule(kinds):
    model, inputs = models.model("llava"), models.inputs("llava", models.ONE_IMAGE, models.THREE_IMAGES)
    parts = {role: KINDS[role][kind]() for role, kind in zip(KINDS, kinds, strict=True)}
    if isinstance(parts["allocate"], VisualHeads):
        parts["allocate"] = VisualHeads(scores=head_scores(model))
    if isinstance(parts["score"], Reconstruction):
        parts["score"] = Reconstruction(instructions=INSTRUCTIONS)
    if parts["allocate"].head_wise and not parts["reduce"].per_head:
        with pytest.raises(ValueError, match="the heads share one choice: give the reduction per_head=True"):
            Recipe("mixed", 0.2, **parts)
        parts["reduce"] = dataclasses.replace(parts["reduce"], per_head=True)
    if parts["decode"].recalls and parts["reduce"].merges:
        with pytest.raises(ValueError, match="merges them into others: take 'evict'"):
            Recipe("mixed", 0.2, **parts)
        return
    cache = CompressedCache(model, Recipe("mixed", 0.2, **parts), inputs)
    logits = models.logits(model, inputs, 12, past_key_values=cache)
    assert torch.stack(logits).isfinite().all()
    report = cache.report()
    kept = [heads for layer in report.kept for heads in layer]
    for heads, length in zip(kept, [31, 65] * 3, strict=True):
        assert all(1 <= count <= length for count in heads)
    # Half an entry a head by rounding.
    assert sum(map(sum, kept)) <= 2 * (0.2 * 3 * (31 + 65) + 6)
    if kinds[3] not in ("grow", "recall"):
        held = [heads for layer in report.held for heads in layer]
        assert sum(map(sum, held)) <= 2 * (0.2 * 3 * (31 + 65 + 2 * 11) + 6 * 5)


def test_one_token_is_a_prompt():
    model = models.model("llama")
    inputs = models.inputs("llama", models.Prompt(0, 1, 0))
    for name in RECIPES:
        cache = CompressedCache(model, recipe_for(model, name, budget=0.1), inputs)
        # The one entry stays, so the answer is the full cache's as long as nothing is dropped.
        answer = models.generate(model, inputs, 2, past_key_values=cache)
        assert torch.equal(answer, models.generate(model, inputs, 2))
        assert cache.report().kept == [[[1, 1]]] * 3
