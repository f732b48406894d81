"""Entries of KV heads that hold different numbers, against plain lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.cache.dense_store import LEAST_GROWTH, growth_step
from sparsight.cache.ragged_store import RaggedStore
from sparsight.compression.eviction import slot_to_write

HEADS, SIZE = 2, 8


def filled(held, dtype=torch.float32, generator=None):
    """Storage with ``held[r]`` random entries of each row, and the same as lists of (position, key, value)."""
    like = torch.zeros(1, HEADS, 1, SIZE, dtype=dtype)
    entries = RaggedStore.allocate(held, like, like)
    rows = []
    for row, count in enumerate(held):
        keys, values = torch.randn(2, 1, count, SIZE, generator=generator).to(dtype)
        entries.fill(row, keys, values, 2 * torch.arange(count)[None])
        rows.append([(2 * i, keys[0, i], values[0, i]) for i in range(count)])
    return entries, rows


def brute_force(rows, query, visible):
    """Softmax over each head's own entries, in float64; ``visible(b, i, position)`` says what new tokens see."""
    batch, heads, count, _ = query.shape
    output = torch.empty_like(query)
    for b in range(batch):
        for h in range(heads):
            row = rows[b * HEADS + h * HEADS // heads]
            for i in range(count):
                seen = [(key, value) for position, key, value in row if visible(b, i, position)]
                keys, values = (torch.stack(states).double() for states in zip(*seen, strict=True))
                output[b, h, i] = (keys @ query[b, h, i].double() * 0.3).softmax(0) @ values
    return output


def check(entries, rows, dtype=torch.float32):
    assert entries.held == [len(row) for row in rows]
    for row, expected in enumerate(rows):
        slots = slice(entries.starts[row], entries.starts[row] + entries.used[row])
        held = sorted(
            (position, key.tolist(), value.tolist())
            for position, key, value in zip(
                entries.flat_positions[slots].tolist(), entries.keys[slots], entries.values[slots], strict=True
            )
            if position >= 0
        )
        assert held == sorted((position, key.tolist(), value.tolist()) for position, key, value in expected)


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(lambda rows: [n for m in rows for n in (m, 13 - m)]),
    group=st.sampled_from([1, 2, 8]),
    count=st.integers(1, 5),
    padding=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_attention_over_heads_of_different_lengths_is_exact(held, group, count, padding, dtype):
    generator = torch.Generator().manual_seed(0)
    entries, rows = filled(held, dtype, generator)
    batch = len(held) // HEADS
    valid = torch.ones(batch, count, dtype=torch.bool)
    # The first sequence's turn is padded on the left.
    valid[0, : min(padding, count - 1)] = False
    keys, values = torch.randn(2, batch, HEADS, count, SIZE, generator=generator).to(dtype)
    entries.append(keys, values, 100, valid if not valid.all() else None)
    for row, entry in enumerate(rows):
        b, h = divmod(row, HEADS)
        entry += [(100 + i, keys[b, h, i], values[b, h, i]) for i in range(count) if valid[b, i]]
    check(entries, rows)
    query = torch.randn(batch, HEADS * group, count, SIZE, generator=generator).to(dtype)
    mask = torch.ones(count, count, dtype=torch.bool).tril() & valid[:, None]
    expected = brute_force(rows, query, lambda b, i, position: position < 100 or mask[b, i, position - 100])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    asked = valid[:, None, :, None].expand_as(query)
    recent = None if valid.all() else mask[:, None]
    output, got = entries.attend_and_tell(query, recent, scaling=0.3)
    for attended in (output, entries.attend(query, recent, scaling=0.3)):
        assert_close(attended[asked], expected[asked], **tolerance)
    assert got.shape == entries.positions.shape
    if valid.all():
        assert_close(got.sum(-1), torch.full((len(held), 1), float(count)))


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    steps=st.lists(st.sampled_from(["append", "overwrite", "vacate", "drop", "select"]), max_size=40),
    seed=st.integers(0, 99),
)
def test_any_sequence_of_changes_leaves_what_lists_would_hold(held, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    entries, rows = filled(held, generator=generator)
    position, appended = 100, 0
    for step in steps:
        keys, values = torch.randn(2, 2, HEADS, 1, SIZE, generator=generator)
        new = [(position, key, value) for key, value in zip(keys.flatten(0, 2), values.flatten(0, 2), strict=True)]
        if step == "append":
            entries.append(keys, values, position)
            rows = [[*row, entry] for row, entry in zip(rows, new, strict=True)]
            position, appended = position + 1, appended + 1
        elif step == "drop" and appended:
            entries.drop_newest(1)
            rows = [row[:-1] for row in rows]
            appended -= 1
        elif step == "select":
            index = torch.randint(0, 2, (2,), generator=generator)
            chosen = entries.rows_of(index)
            entries.select_rows(chosen)
            rows = [list(rows[row]) for row in chosen.tolist()]
        elif step == "overwrite":
            # Every other row takes a vacant slot, the others overwrite their oldest entry.
            grow = [row % 2 == 0 for row in range(4)]
            entries.reserve(1)
            slots = slot_to_write(entries.positions, torch.zeros(4, 1), torch.tensor(grow))
            entries.overwrite(keys, values, position, slots, grow)
            kept = [
                row if grows else sorted(row, key=lambda e: e[0])[1:] for row, grows in zip(rows, grow, strict=True)
            ]
            rows = [[*row, entry] for row, entry in zip(kept, new, strict=True)]
            position, appended = position + 1, 0
        elif step == "vacate" and all(len(row) > 1 for row in rows):
            slots = slot_to_write(entries.positions, torch.zeros(4, 1), torch.zeros(4, dtype=torch.bool))
            entries.vacate(slots, [True, False, True, False])
            rows = [sorted(row, key=lambda e: e[0])[1:] if r % 2 == 0 else row for r, row in enumerate(rows)]
            appended = 0
    check(entries, rows)


def test_storage_is_as_long_as_each_row_needs():
    entries, rows = filled([40, 1, 3, 20], torch.bfloat16)
    assert entries.nbytes == (40 + 1 + 3 + 20 + 4 * LEAST_GROWTH) * (2 * SIZE * 2 + 4)
    new = torch.ones(2, HEADS, 1, SIZE, dtype=torch.bfloat16)
    for step in range(LEAST_GROWTH + 1):
        entries.append(new, new, 100 + step)
    assert entries.capacities == [count + 2 * LEAST_GROWTH for count in (40, 1, 3, 20)]
    assert [len(row) for row in rows] == [40, 1, 3, 20]
    assert entries.by_head(entries.held) == [[57, 18], [20, 37]]


def test_long_rows_grow_by_an_eighth_of_their_mean():
    entries, _ = filled([800, 200])
    assert entries.capacities == [800 + growth_step(500), 200 + growth_step(500)]


def test_positions_at_an_index_are_each_rows_own():
    entries, _ = filled([4, 2])
    assert entries.positions_at([3, 3], next_position=50).tolist() == [[6], [51]]
    assert entries.token_bytes == 2 * 2 * SIZE * 4
