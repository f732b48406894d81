"""Attention over entries held by the kernel, against the torch version."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.attention import kernels
from sparsight.cache.dense_store import DenseStore
from sparsight.cache.ragged_store import RaggedStore
from tests.attention.kernels.conftest import DEVICE

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
from sparsight.attention.kernels import decode as kernel

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-3, 2e-3)}


def held(entries, query, scaling=0.3):
    """What the kernel and torch say for the same entries, on the CPU."""
    rows = entries.rows()
    states = (each.to(DEVICE) for each in (query, *entries.tensors, rows))
    return kernels.attend(*states, int(rows[1].max()), scaling).cpu(), entries.attend(query, None, scaling)


def check(pair):
    ours, theirs = pair
    assert ours.dtype == theirs.dtype
    rtol, atol = TOLERANCE[theirs.dtype]
    assert_close(ours, theirs, rtol=rtol, atol=atol)


def rectangular(counts, kv_heads, size, dtype, generator, value_size=None):
    like = torch.zeros(1, kv_heads, 1, size, dtype=dtype)
    like_values = torch.zeros(1, kv_heads, 1, value_size or size, dtype=dtype)
    entries = DenseStore.allocate(counts, like, like_values)
    for row, count in enumerate(counts):
        keys = torch.randn(kv_heads, count, size, generator=generator).to(dtype)
        values = torch.randn(kv_heads, count, value_size or size, generator=generator).to(dtype)
        entries.fill(row, keys, values, torch.arange(count).expand(kv_heads, -1))
    return entries


def ragged(counts, kv_heads, size, dtype, generator):
    like = torch.zeros(1, kv_heads, 1, size, dtype=dtype)
    entries = RaggedStore.allocate(counts, like, like)
    for row, count in enumerate(counts):
        keys, values = torch.randn(2, 1, count, size, generator=generator).to(dtype)
        entries.fill(row, keys, values, torch.arange(count)[None])
    return entries


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 7]),
    size=st.sampled_from([1, 8, 24, 80]),
    dtype=DTYPES,
    programs=st.sampled_from([1, 5, 512]),
    seed=st.integers(0, 1000),
)
def test_attention_over_sequences_of_different_lengths_equals_torchs(
    counts, kv_heads, group, size, dtype, programs, seed
):
    generator = torch.Generator().manual_seed(seed)
    entries = rectangular(counts, kv_heads, size, dtype, generator)
    query = torch.randn(len(counts), kv_heads * group, 1, size, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PROGRAMS", programs)
        check(held(entries, query))


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 150), min_size=2, max_size=4).filter(lambda counts: len(counts) % 2 == 0),
    group=st.sampled_from([1, 4]),
    size=st.sampled_from([8, 40]),
    dtype=DTYPES,
    programs=st.sampled_from([1, 5, 512]),
    vacant=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_attention_over_heads_of_different_lengths_equals_torchs(counts, group, size, dtype, programs, vacant, seed):
    generator = torch.Generator().manual_seed(seed)
    entries = ragged(counts, 2, size, dtype, generator)
    for step in range(vacant):
        # Vacated slots lie anywhere; one entry of each row stays.
        gone = [count > step + 1 for count in entries.held]
        slots = torch.tensor([[(5 * step) % count if more else 0] for count, more in zip(counts, gone, strict=True)])
        again = entries.positions.gather(2, slots[..., None])[:, 0, 0] < 0
        entries.vacate(slots, [more and not bool(twice) for more, twice in zip(gone, again, strict=True)])
    query = torch.randn(len(counts) // 2, 2 * group, 1, size, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PROGRAMS", programs)
        check(held(entries, query))


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_heads(size, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 1, size, generator=generator).to(dtype)
    check(held(ragged([70, 3], 2, size, dtype, generator), query))


def test_values_may_have_another_size_than_keys():
    generator = torch.Generator().manual_seed(0)
    entries = rectangular([9, 4], 2, 24, torch.float32, generator, value_size=16)
    ours, theirs = held(entries, torch.randn(2, 4, 1, 24, generator=generator))
    assert ours.shape == (2, 4, 1, 16)
    assert_close(ours, theirs)


def test_the_usual_scaling_is_that_of_the_heads_size():
    generator = torch.Generator().manual_seed(0)
    entries = ragged([9, 4], 2, 16, torch.float32, generator)
    query = torch.randn(1, 2, 1, 16, generator=generator)
    ours, theirs = held(entries, query, None)
    assert_close(ours, theirs)
    assert_close(ours, held(entries, query, 0.25)[0])


def test_logits_of_any_size_are_safe():
    generator = torch.Generator().manual_seed(0)
    entries = rectangular([40], 1, 8, torch.float32, generator)
    check(held(entries, 1000 * torch.randn(1, 2, 1, 8, generator=generator)))
