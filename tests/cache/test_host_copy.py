"""The full keys and values of prompts in host memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from sparsight import CompressedCache, VLCache
from sparsight.cache.host_copy import HostCopy, stored_bytes
from tests.support import models
from tests.support.models import ONE_IMAGE, THREE_IMAGES, generate

RECIPE = VLCache(budget=0.2)


def prompts(family="llava"):
    return models.model(family), models.inputs(family, ONE_IMAGE, THREE_IMAGES)


def full_states(model, inputs):
    """Keys and values of plain transformers' cache, ``[B, H_kv, T, D]`` by layer."""
    cache = DynamicCache()
    generate(model, inputs, 1, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_copy_has_the_full_keys_and_values_of_every_sequence(family):
    model, inputs = prompts(family)
    cache = CompressedCache(model, RECIPE, inputs, keep="host")
    generate(model, inputs, 3, past_key_values=cache)
    for index, full in enumerate(full_states(model, inputs)):
        for sequence, span in enumerate(cache.prompt.spans):
            for states, own in zip(full, cache.host[sequence].states(index), strict=True):
                torch.testing.assert_close(own, states[sequence, :, span.start :], rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_unless_it_is_requested():
    model, inputs = prompts()
    cache = CompressedCache(model, RECIPE, inputs)
    generate(model, inputs, 3, past_key_values=cache)
    assert cache.host == []
    assert cache.report().host_bytes == 0
    assert "host memory" not in str(cache.report())


def test_the_report_counts_the_bytes_of_valid_tokens():
    model, inputs = prompts()
    cache = CompressedCache(model, RECIPE, inputs, keep="host")
    generate(model, inputs, 3, past_key_values=cache)
    tokens = int(inputs["attention_mask"].sum())
    assert cache.report().host_bytes == cache.report().full_bytes // (2 * cache.get_seq_length()) * tokens
    assert "in host memory" in str(cache.report())


def test_sequences_are_replaced_together_with_their_copies():
    model, inputs = prompts()
    cache = CompressedCache(model, RECIPE, inputs, keep="host")
    generate(model, inputs, 3, past_key_values=cache)
    first, second = cache.host
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    assert cache.host == [second, second, first]
    assert copy.deepcopy(cache).host == cache.host
    cache.reset()
    assert cache.host == []


def test_tokens_of_a_layer_by_range():
    keys, values = torch.randn(2, 7, 4), torch.randn(2, 7, 3)
    copied = HostCopy()
    copied.add_layer(keys, values)
    assert (copied.tokens, len(copied), copied.nbytes) == (7, 1, 4 * 2 * 7 * 7)
    own_keys, own_values = copied.states(0, 2, 5)
    assert torch.equal(own_keys, keys[:, 2:5])
    assert torch.equal(own_values, values[:, 2:5])


@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 3),
    tokens=st.integers(1, 8),
    size=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 100.0]),
    cuts=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    seed=st.integers(0, 999),
)
def test_8_bits_are_the_nearest_codes_of_each_token_and_head(heads, tokens, size, dtype, spread, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = ((torch.randn(heads, tokens, size, generator=generator) * spread).to(dtype) for _ in range(2))
    copied = HostCopy("int8")
    copied.add_layer(keys, values)
    itemsize = keys.element_size()
    assert (
        copied.nbytes == 2 * heads * tokens * (size + itemsize) == heads * tokens * stored_bytes(size, itemsize, "int8")
    )
    rounding = torch.finfo(dtype)
    for own, states in zip(copied.states(0), (keys, values), strict=True):
        assert own.dtype == dtype
        for h in range(heads):
            for t in range(tokens):
                row = states[h, t].double().tolist()
                largest = max(map(abs, row))
                for each, exact in zip(own[h, t].double().tolist(), row, strict=True):
                    error = 0.5 * largest / 127 + 2 * largest * rounding.eps + 127 * rounding.smallest_normal
                    assert abs(each - exact) <= error
    start, stop = min(*cuts, tokens), min(max(cuts), tokens)
    parts = [copied.part(0, start), copied.part(start, stop).compact(), copied.part(stop, tokens)]
    for own, expected in zip(HostCopy.joined(parts).states(0), copied.states(0), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llava", {"keep": "host", "host_dtype": "int4"}, "host_dtype must be 'int8', got 'int4'"),
        ("llava", {"keep": "disk"}, "keep must be 'host', got 'disk'"),
        ("llava", {"keep": "host", "max_new_tokens": 5}, "does not go with max_new_tokens"),
        ("llava", {"keep": "host", "prefill_bound": 2}, "does not go with prefill_bound"),
        ("gemma3", {"keep": "host"}, "cannot go back to earlier tokens"),
        ("paligemma", {"keep": "host"}, "cannot process a prompt in parts"),
    ],
)
def test_what_does_not_go_with_a_copy_is_refused(family, options, message):
    model, inputs = models.model(family), models.inputs(family, ONE_IMAGE)
    with pytest.raises(ValueError, match=message):
        CompressedCache(model, RECIPE, inputs, **options)
