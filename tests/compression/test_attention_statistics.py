import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from sparsight.compression import attention_statistics
from sparsight.compression.attention_statistics import attend_and_sum, attention_sums
from tests.support import reference
from tests.support.memory import PeakMemory

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = {
    "kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 8]),
    "keys": st.integers(1, 70),
    "rows": st.integers(1, 70),
}


def random_states(heads, kv_heads, rows, keys, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, rows, size, generator=generator) * 3
    return query.to(dtype), torch.randn(kv_heads, keys, size, generator=generator).to(dtype)


def brute_force(query, key, scaling, threshold):
    """Column sums and zeroed weights from the full matrix, by the definitions."""
    heads, rows, _ = query.shape
    keys = key.shape[1]
    whole = torch.zeros(heads, keys, query.shape[-1])
    whole[:, keys - rows :] = query.float()
    attention = reference.full_attention(whole[None], key[None].float(), [[True] * keys], scaling)[0]
    last = list(range(keys - rows, keys))
    visible = sum(i + 1 for i in last)
    return reference.column_sums(attention, last, len(key)), reference.sparsity(attention, last, threshold) * visible


@settings(max_examples=60, deadline=None)
@given(
    **SIZES,
    size=st.sampled_from([1, 8, 24]),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_sums_and_zeroed_weights_equal_the_full_matrix(kv_heads, group, keys, rows, size, dtype, seed):
    rows = min(rows, keys)
    query, key = random_states(kv_heads * group, kv_heads, rows, keys, size, dtype, seed)
    sums, zeroed = attention_sums(query, key, size**-0.5, threshold=0.01)
    expected_sums, expected_zeroed = brute_force(query, key, size**-0.5, 0.01)
    assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-5)
    assert_close(zeroed.item() / len(query), expected_zeroed, rtol=0, atol=1e-6)
    assert_close(sums.sum(-1), torch.full((kv_heads,), float(rows)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [1, 33, 300])
def test_two_passes_over_blocks_of_keys_equal_the_full_matrix(rows, monkeypatch):
    monkeypatch.setattr(attention_statistics, "BLOCK_KEYS", 64)
    query, key = random_states(4, 2, rows, 300, 16, torch.float32)
    sums, zeroed = attention_sums(query, key, 0.25, threshold=0.05)
    expected_sums, expected_zeroed = brute_force(query, key, 0.25, 0.05)
    assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-5)
    assert_close(zeroed.item() / len(query), expected_zeroed, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    **SIZES,
    counted=st.integers(0, 70),
    block_keys=st.sampled_from([16, 4096]),
    block_elements=st.sampled_from([64, 2**18]),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_one_pass_gives_the_attention_and_what_two_passes_tell_of_it(
    kv_heads, group, keys, rows, counted, block_keys, block_elements, dtype, seed
):
    rows = min(rows, keys)
    counted = min(counted, rows)
    query, key = random_states(kv_heads * group, kv_heads, rows, keys, 8, dtype, seed)
    value = random_states(1, kv_heads, 1, keys, 12, dtype, seed + 1)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_statistics, "BLOCK_KEYS", block_keys)
        patch.setattr(attention_statistics, "BLOCK_ROWS", 2)
        patch.setattr(attention_statistics, "BLOCK_ELEMENTS", block_elements)
        attended, sums, zeroed = attend_and_sum(query, key, value, 0.3, 0.01, counted)
    logits = query.double() @ key.double().repeat_interleave(group, dim=0).mT * 0.3
    attention = logits.masked_fill(torch.ones(rows, keys).triu(keys - rows + 1).bool(), -torch.inf).softmax(-1)
    expected = attention @ value.double().repeat_interleave(group, dim=0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert attended.dtype == dtype
    assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance)
    assert_close(sums, attention_sums(query, key, 0.3)[0], rtol=1e-5, atol=1e-5)
    if counted:
        # Rounding decides about weights that lie at the threshold.
        fewest, most = (
            attention_sums(query[:, rows - counted :], key, 0.3, 0.01 * near)[1] for near in (1 - 1e-5, 1 + 1e-5)
        )
        assert fewest <= zeroed <= most
    else:
        assert zeroed == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_in_one_pass_is_as_exact_as_torchs(dtype):
    query, key = random_states(4, 4, 400, 400, 32, dtype)
    value = random_states(4, 4, 400, 400, 32, dtype, seed=1)[1]
    exact = scaled_dot_product_attention(*(states.double() for states in (query, key, value)), is_causal=True)
    own, torchs = (
        (attended.double() - exact).abs().max()
        for attended in (
            attend_and_sum(query, key, value, 32**-0.5)[0],
            scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0],
        )
    )
    assert own < 1.1 * torchs


def test_without_a_threshold_nothing_is_counted():
    query, key = random_states(2, 2, 3, 9, 4, torch.float32)
    assert attention_sums(query, key, 0.5)[1] is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "keys", "size"),
    [(32, 32, 64, 20_000, 128), (32, 4, 2000, 3000, 64), (8, 8, 10, 150_000, 64), (2, 1, 9000, 9000, 8)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transient_memory_stays_under_64_mebibytes(heads, kv_heads, rows, keys, size, dtype):
    query, key = random_states(heads, kv_heads, rows, keys, size, dtype)
    gc.collect()
    with PeakMemory(query, key) as memory:
        attention_sums(query, key, 0.1, threshold=0.01)
    assert 2**18 < memory.peak < 64 * 2**20


@settings(max_examples=40, deadline=None)
@given(
    **SIZES,
    block_keys=st.sampled_from([16, 4096]),
    seed=st.integers(0, 1000),
)
def test_sums_over_the_keys_that_each_query_sees_equal_the_full_matrix(kv_heads, group, keys, rows, block_keys, seed):
    rows = min(rows, keys)
    query, key = random_states(kv_heads * group, kv_heads, rows, keys, 8, torch.float32, seed)
    visible = torch.rand(rows, keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    visible[torch.arange(rows), torch.arange(rows)] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_statistics, "BLOCK_KEYS", block_keys)
        sums, zeroed = attention_sums(query, key, 0.5, threshold=0.02, visible=visible)
    logits = query @ key.repeat_interleave(group, dim=0).mT * 0.5
    attention = torch.where(visible, logits, -torch.inf).softmax(-1)
    assert_close(sums.double(), reference.column_sums(attention, list(range(rows)), kv_heads), rtol=1e-5, atol=1e-5)
    low = attention < 0.02 * attention.amax(-1, keepdim=True)
    assert abs(zeroed.item() - int((low & visible).sum())) <= 1
    assert attention_statistics.visible_pairs(rows, keys, visible) == visible.sum()
