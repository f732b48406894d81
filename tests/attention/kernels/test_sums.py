"""Attention sums by the kernel, against the torch version and the full matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import attention_statistics
from sparsight.compression.attention_statistics import visible_pairs
from tests.attention.kernels.conftest import DEVICE
from tests.compression.test_attention_statistics import brute_force, random_states

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
from sparsight.attention.kernels import sums as kernel

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def both(query, key, scaling, threshold, visible=None):
    """Sums and survivors by the kernel and by torch, on the CPU."""
    given_ = [None if each is None else each.to(DEVICE) for each in (query, key, visible)]
    ours = kernel.attention_sums(given_[0], given_[1], scaling, threshold, given_[2])
    return [each.cpu() for each in ours], attention_statistics._blocked_sums(
        query, key, scaling, threshold, query.shape[1], visible
    )


def check(ours, theirs, pairs):
    assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    # A weight that equals its threshold but for rounding may fall on either side.
    assert abs(ours[1].item() - theirs[1].item()) <= max(1, pairs // 5000)


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 7]),
    keys=st.integers(1, 90),
    rows=st.integers(1, 90),
    size=st.sampled_from([1, 8, 24, 80]),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_sums_and_survivors_equal_torchs(kv_heads, group, keys, rows, size, dtype, seed):
    rows = min(rows, keys)
    query, key = random_states(kv_heads * group, kv_heads, rows, keys, size, dtype, seed)
    ours, theirs = both(query, key, size**-0.5, 0.01)
    check(ours, theirs, visible_pairs(rows, keys) * len(query))
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.int64
    assert_close(ours[0].sum(-1), torch.full((kv_heads,), float(rows)), rtol=1e-4, atol=0)


@settings(max_examples=15, deadline=None)
@given(
    group=st.sampled_from([1, 3]),
    keys=st.integers(1, 80),
    rows=st.integers(1, 40),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_sums_over_the_keys_that_each_query_sees_equal_torchs(group, keys, rows, dtype, seed):
    query, key = random_states(2 * group, 2, min(rows, keys), keys, 8, dtype, seed)
    visible = torch.rand(query.shape[1], keys, generator=torch.Generator().manual_seed(seed)) < 0.3
    visible[:, keys // 2] = True
    ours, theirs = both(query, key, 0.5, 0.02, visible)
    check(ours, theirs, int(visible.sum()) * len(query))


@pytest.mark.parametrize("splits", [1, 3, 512])
def test_keys_split_among_programs_equal_the_full_matrix(splits, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", splits)
    query, key = random_states(4, 2, 33, 150, 16, torch.float32)
    ours, _ = both(query, key, 0.25, 0.05)
    expected_sums, expected_zeroed = brute_force(query, key, 0.25, 0.05)
    assert_close(ours[0].double(), expected_sums, rtol=1e-5, atol=1e-5)
    zeroed = visible_pairs(33, 150) * 4 - ours[1].item()
    assert_close(zeroed / 4, expected_zeroed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_heads(size, dtype):
    query, key = random_states(2, 1, 5, 70, size, dtype)
    check(*both(query, key, size**-0.5, 0.01), visible_pairs(5, 70) * 2)


def test_states_that_are_views_of_a_batch_need_no_copy():
    states = torch.randn(2, 5, 3, 16)
    query, key = torch.randn(2, 4, 6, 16)[1, :, 1:5], states[1].transpose(0, 1)[1:, 0:5]
    assert not query.is_contiguous()
    assert not key.is_contiguous()
    check(*both(query, key, 0.25, 0.1), visible_pairs(4, 5) * 4)


def test_without_a_threshold_nothing_survives():
    query, key = random_states(2, 2, 3, 9, 4, torch.float32)
    ours, theirs = both(query, key, 0.5, None)
    assert ours[1] == theirs[1] == 0
    assert_close(ours[0], theirs[0])


def test_of_a_row_that_is_not_a_number_nothing_survives():
    query, key = random_states(2, 1, 3, 9, 8, torch.float32)
    query[0, 1] = torch.nan
    ours, theirs = both(query, key, 0.5, 1e-6)
    assert ours[1] == theirs[1]
    key[0, 0] = torch.nan
    ours, theirs = both(query, key, 0.5, 1e-6)
    assert ours[1] == theirs[1] == 0
