import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.cache.dense_store import LEAST_GROWTH, DenseStore, growth_step


def filled(held, kv_heads=2, size=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    like = torch.zeros(1, kv_heads, 1, size, dtype=dtype)
    entries = DenseStore.allocate(held, like, like)
    for row, count in enumerate(held):
        keys, values = torch.randn(2, kv_heads, count, size, generator=generator).to(dtype)
        entries.fill(row, keys, values, torch.arange(count).expand(kv_heads, -1))
    return entries


def brute_force(entries, query, mask, scaling):
    """Softmax over each head's own entries, in float64."""
    batch, heads, count, _ = query.shape
    group = heads // entries.keys.shape[1]
    output = torch.empty_like(query)
    for b in range(batch):
        for h in range(heads):
            kv = h // group
            for i in range(count):
                slots = [s for s in range(entries.used) if entries.positions[b, kv, s] >= 0]
                first_new = entries.used - count
                slots = [s for s in slots if s < first_new or mask[b, i, s - first_new]]
                keys, values = entries.keys[b, kv, slots].double(), entries.values[b, kv, slots].double()
                weights = (keys @ query[b, h, i].double() * scaling).softmax(0)
                output[b, h, i] = weights @ values
    return output


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    group=st.sampled_from([1, 2, 8]),
    count=st.integers(1, 5),
    padding=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_attention_over_ragged_entries_is_exact(held, group, count, padding, dtype):
    entries = filled(held, dtype=dtype)
    batch = len(held)
    generator = torch.Generator().manual_seed(1)
    valid = torch.ones(batch, count, dtype=torch.bool)
    # The first sequence's turn is padded on the left.
    valid[0, : min(padding, count - 1)] = False
    keys, values = torch.randn(2, batch, 2, count, 8, generator=generator).to(dtype)
    entries.append(keys, values, 100, valid if not valid.all() else None)
    query = torch.randn(batch, 2 * group, count, 8, generator=generator).to(dtype)
    mask = torch.ones(count, count, dtype=torch.bool).tril() & valid[:, None]
    recent = None if valid.all() else mask[:, None]
    output = entries.attend(query, recent, scaling=0.3)
    expected = brute_force(entries, query, mask, 0.3)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    rows = valid[:, None, :, None].expand_as(output)
    assert_close(output[rows], expected[rows], **tolerance)
    assert entries.held == [n + int(v.sum()) for n, v in zip(held, valid, strict=True)]


def test_storage_grows_in_steps_and_keeps_its_entries():
    entries = filled([5, 3])
    storage, before = entries.keys.data_ptr(), entries.keys[:, :, :5].clone()
    new = torch.ones(2, 2, 1, 8)
    for step in range(LEAST_GROWTH):
        entries.append(new, new, 5 + step)
    # No copy so far: the storage had room for one step.
    assert entries.keys.data_ptr() == storage
    assert entries.keys.shape[2] == 5 + LEAST_GROWTH
    entries.append(new, new, 99)
    assert entries.keys.shape[2] == 5 + 2 * LEAST_GROWTH
    assert torch.equal(entries.keys[:, :, :5], before)
    assert entries.held == [5 + 17, 3 + 17]
    assert growth_step(800) == 100


def test_bytes_are_those_of_the_tensors():
    entries = filled([5], kv_heads=2, size=8, dtype=torch.bfloat16)
    assert entries.nbytes == 2 * (5 + LEAST_GROWTH) * (2 * 8 * 2 + 4)


def test_the_newest_entries_can_be_dropped_padding_included():
    entries = filled([4, 2])
    new = torch.ones(2, 2, 3, 8)
    entries.append(new, new, 10, torch.tensor([[False, True, True], [True, True, True]]))
    entries.drop_newest(2)
    assert entries.held == [4, 3]
    entries.drop_newest(1)
    assert entries.held == [4, 2]
    assert entries.used == 4
    assert (entries.positions[:, :, 4:] == -1).all()


def test_rows_are_selected_in_any_order():
    entries = filled([4, 2, 3])
    keys = entries.keys.clone()
    entries.select_rows(torch.tensor([2, 0, 0]))
    assert entries.held == [3, 4, 4]
    assert torch.equal(entries.keys, keys[[2, 0, 0]])


@pytest.mark.parametrize(("index", "position"), [(0, 0), (3, 3), (4, 50), (6, 52)])
def test_the_position_at_an_index_counts_coming_entries(index, position):
    assert filled([4]).positions_at([index], next_position=50).tolist() == [[position, position]]
