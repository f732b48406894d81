import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight import CompressedCache, VLCache
from sparsight.compression import FutureQueries, MixKV, Reconstruction, TemporalChange, Uniform
from sparsight.compression.mixkv_score import mixed
from tests.support import models


def by_hand(score, keys, values, always):
    """MixKV for one KV head, with the mean cosine of all pairs of different keys."""
    length = len(score)
    units = [[x / math.hypot(*key) for x in key] for key in keys]

    def dot(one, other):
        return sum(a * b for a, b in zip(one, other, strict=True))

    pairs = [dot(units[i], units[j]) for i in range(length) for j in range(length) if i != j]
    redundancy = sum(pairs) / len(pairs)
    mean = [sum(column) / length for column in zip(*units, strict=True)]
    open_ones = [j for j in range(length) if not always[j]]
    level = sum(score[j] for j in open_ones) / len(open_ones)

    def scaled(numbers):
        spread = max(numbers) - min(numbers)
        numbers = [(number - min(numbers)) / spread if spread else 0.0 for number in numbers]
        return [number * level * len(numbers) / sum(numbers) if any(numbers) else 0.0 for number in numbers]

    norms = scaled([math.hypot(*values[j]) for j in open_ones])
    diversities = scaled([-dot(units[j], mean) for j in open_ones])
    mix = list(score)
    for j, norm, diversity in zip(open_ones, norms, diversities, strict=True):
        mix[j] = (1 - redundancy) * (score[j] + norm) + redundancy * diversity
    return mix


@settings(deadline=None)
@given(heads=st.integers(1, 3), length=st.integers(3, 30), last=st.integers(0, 29), seed=st.integers(0, 999))
def test_each_head_is_mixed_as_by_hand(heads, length, last, seed):
    # Two unit keys are always equally far from their mean, which rounding would break.
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(heads, length, generator=generator)
    key, value = (torch.randn(heads, length, 4, generator=generator) + 0.5 for _ in range(2))
    always = torch.arange(length) >= length - min(last, length - 1)
    expected = [
        by_hand(*each, always.tolist()) for each in zip(score.tolist(), key.tolist(), value.tolist(), strict=True)
    ]
    assert_close(mixed(score, key, value, always), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_equal_keys_leave_nothing_but_attention_and_norms():
    # Of equal keys none is more diverse, and the redundancy is 1.
    score, value = torch.rand(1, 6), torch.rand(1, 6, 2)
    mix = mixed(score, torch.ones(1, 6, 2), value, torch.zeros(6, dtype=torch.bool))
    assert_close(mix, torch.zeros(1, 6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5])
def test_where_everything_stays_the_score_is_unchanged(length):
    score, states = torch.rand(2, length), torch.rand(2, length, 3)
    assert torch.equal(mixed(score, states, states, torch.ones(length, dtype=torch.bool)), score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_in_half_precision_are_mixed_in_float32(dtype):
    key, value = (torch.randn(2, 50, 8).to(dtype) * 100 for _ in range(2))
    always = torch.arange(50) > 40
    score = torch.rand(2, 50)
    assert torch.equal(mixed(score, key, value, always), mixed(score, key.float(), value.float(), always))


@pytest.mark.parametrize("score", [FutureQueries(), TemporalChange()])
def test_scores_without_attention_sums_are_mixed_too(score):
    model, inputs = models.model("qwen2_5_vl"), models.inputs("qwen2_5_vl", models.ONE_VIDEO)
    kept = []
    for each in (score, MixKV(score)):
        cache = CompressedCache(model, replace(VLCache(0.3), score=each, allocate=Uniform()), inputs)
        models.generate(model, inputs, 1, past_key_values=cache)
        kept.append(cache.kept_positions(1))
    assert not torch.equal(*kept)


def test_a_score_that_repeats_the_prompt_is_refused():
    with pytest.raises(ValueError, match="'mixkv' cannot wrap 'reconstruction', which repeats the prompt"):
        MixKV(Reconstruction())
