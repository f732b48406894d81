"""Dense and ragged stores hold, attend to and forget what plain lists would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.cache.kv_store import LEAST_GROWTH, growth_step
from sparsight.cache.step_metadata import Lengths
from tests.cache.stores import attention_over_lists, check_entries, filled

HEADS, SIZE = 2, 8
KINDS = pytest.mark.parametrize("kind", ["dense", "ragged"])
KIND = st.sampled_from(["dense", "ragged"])


@settings(max_examples=100, deadline=None)
@given(
    kind=KIND,
    held=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(lambda rows: [n for m in rows for n in (m, 13 - m)]),
    group=st.sampled_from([1, 2, 8]),
    count=st.integers(1, 5),
    padding=st.integers(0, 2),
    static=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_attention_over_rows_of_different_lengths_is_exact(kind, held, group, count, padding, static, dtype):
    generator = torch.Generator().manual_seed(0)
    store, rows = filled(kind, held, dtype=dtype)
    batch = len(held) // HEADS
    valid = torch.ones(batch, count, dtype=torch.bool)
    # The first sequence's turn is padded on the left.
    valid[0, : min(padding, count - 1)] = False
    keys, values = torch.randn(2, batch, HEADS, count, SIZE, generator=generator).to(dtype)
    store.append(keys, values, 100, valid if not valid.all() else None)
    for row, entry in enumerate(rows):
        b, h = divmod(row, HEADS)
        entry += [(100 + i, keys[b, h, i], values[b, h, i]) for i in range(count) if valid[b, i]]
    check_entries(store, rows)
    store.static = static and count == 1
    query = torch.randn(batch, HEADS * group, count, SIZE, generator=generator).to(dtype)
    mask = torch.ones(count, count, dtype=torch.bool).tril() & valid[:, None]
    expected, by_position = (
        attention_over_lists(
            rows, query, HEADS, 0.3, lambda b, i, position: position < 100 or mask[b, i, position - 100]
        )
        if valid.all()
        else (None, None)
    )
    recent = None if valid.all() else mask[:, None]
    output, received = store.attend_and_score(query, recent, scaling=0.3)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    asked = valid[:, None, :, None].expand_as(query)
    assert received.shape == store.positions.shape
    assert_close(store.attend(query, recent, scaling=0.3)[asked], output[asked], **tolerance)
    if expected is None:
        for b, i in valid.nonzero().tolist():
            alone, _ = attention_over_lists(
                rows[b * HEADS : (b + 1) * HEADS], query[b, None, :, i, None], HEADS, 0.3,
                lambda _, __, position, b=b, i=i: position < 100 or bool(mask[b, i, position - 100]),
            )  # fmt: skip
            assert_close(output[b, :, i], alone[0, :, 0], **tolerance)
        return
    assert_close(output, expected, **tolerance)
    found = [
        {p: w for p, w in zip(positions, weights, strict=True) if p >= 0}
        for positions, weights in zip(store.positions.tolist(), received.tolist(), strict=True)
    ]
    for ours, theirs in zip(found, by_position, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5 if dtype == torch.float32 else 2e-2)


@settings(max_examples=80, deadline=None)
@given(
    kind=KIND,
    held=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    steps=st.lists(st.sampled_from(["append", "turn", "overwrite", "vacate", "crop", "select"]), max_size=40),
    seed=st.integers(0, 99),
)
def test_any_sequence_of_changes_leaves_what_lists_would_hold(kind, held, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    store, rows = filled(kind, held, seed=seed)
    position = first = 100
    for change in steps:
        count = 3 if change == "turn" else 1
        keys, values = torch.randn(2, 2, HEADS, count, SIZE, generator=generator)
        new = [
            [(position + i, key[i], value[i]) for i in range(count)]
            for key, value in zip(keys.flatten(0, 1), values.flatten(0, 1), strict=True)
        ]
        if change in ("append", "turn"):
            store.append(keys, values, position)
            rows = [[*row, *entries] for row, entries in zip(rows, new, strict=True)]
            position += count
        elif change == "crop":
            # What was overwritten is lost: only tokens appended since then can be taken back.
            position = max(position - 2, first)
            store.crop(position)
            rows = [[entry for entry in row if entry[0] < position] for row in rows]
        elif change == "select":
            index = torch.randint(0, 2, (2,), generator=generator)
            store.select(index)
            rows = [list(rows[row]) for row in store.row_index(index).tolist()]
        elif change == "overwrite":
            # Every other row, and one without entries, takes a vacant slot; the others overwrite their oldest entry.
            store.reserve(1)
            added = torch.tensor([[1, 0, 1, 0]]).maximum((store.held == 0).long())
            positions = store.positions
            oldest = positions.masked_fill(positions < 0, 10**6).argmin(-1)
            slots = torch.where(added.bool(), store.used, oldest)
            lengths = Lengths(store.held[None], store.used[None])
            store.share(lengths, 0)
            lengths.grow(added.bool(), slots)
            store.write(keys, values, torch.full((4,), position).int(), store.starts + slots[0])
            rows = [sorted(row, key=lambda e: e[0])[1 - m :] for row, m in zip(rows, added[0].tolist(), strict=True)]
            rows = [[*row, *entries] for row, entries in zip(rows, new, strict=True)]
            position = first = position + 1
        elif all(len(row) > 1 for row in rows):
            oldest = torch.tensor([min(p for p, _, _ in row) for row in rows])
            store.vacate(store.positions == oldest[:, None])
            rows = [sorted(row, key=lambda e: e[0])[1:] for row in rows]
        check_entries(store, rows)


@KINDS
def test_storage_grows_in_steps_and_keeps_its_entries(kind):
    store, rows = filled(kind, [5, 5, 5, 5])
    storage = store.keys.data_ptr()
    new = torch.ones(2, HEADS, 1, SIZE)
    for step in range(LEAST_GROWTH):
        store.append(new, new, 100 + step)
    # No copy so far: the storage had capacity for one step.
    assert store.keys.data_ptr() == storage
    assert store.capacities == [5 + LEAST_GROWTH] * 4
    store.append(new, new, 999)
    assert store.capacities == [5 + 2 * LEAST_GROWTH] * 4
    added = [(position, new[0, 0, 0], new[0, 0, 0]) for position in (*range(100, 100 + LEAST_GROWTH), 999)]
    check_entries(store, [[*row, *added] for row in rows])
    assert growth_step(800) == 100


def test_ragged_rows_have_as_many_slots_as_each_needs():
    store, _ = filled("ragged", [40, 1, 3, 20], dtype=torch.bfloat16)
    assert store.nbytes == (40 + 1 + 3 + 20 + 4 * LEAST_GROWTH) * (2 * SIZE * 2 + 4)
    assert store.token_bytes == 4 * 2 * SIZE * 2
    new = torch.ones(2, HEADS, 1, SIZE, dtype=torch.bfloat16)
    for step in range(LEAST_GROWTH + 1):
        store.append(new, new, 100 + step)
    assert store.capacities == [count + 2 * LEAST_GROWTH for count in (40, 1, 3, 20)]
    assert store.by_head(store.held.tolist()) == [[57, 18], [20, 37]]
    assert filled("ragged", [800, 200])[0].capacities == [800 + growth_step(500), 200 + growth_step(500)]


def test_bytes_are_those_of_the_tensors():
    store, _ = filled("dense", [5, 5], dtype=torch.bfloat16)
    assert store.nbytes == 2 * (5 + LEAST_GROWTH) * (2 * SIZE * 2 + 4)


@KINDS
def test_what_is_cropped_leaves_its_slots_to_others(kind):
    store, rows = filled(kind, [4, 4, 2, 2])
    new = torch.ones(2, HEADS, 3, SIZE)
    store.append(new, new, 10, torch.tensor([[False, True, True], [True, True, True]]))
    store.crop(11)
    assert store.held.tolist() == [4, 4, 3, 3]
    store.crop(10)
    check_entries(store, rows)
    assert store.used.tolist() == [4, 4, 2, 2]
    capacities = store.capacities
    for step in range(LEAST_GROWTH):
        store.append(new[:, :, :1], new[:, :, :1], 10 + step)
    assert store.capacities == capacities
