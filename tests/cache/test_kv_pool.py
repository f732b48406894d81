"""Slots of a pool: each belongs to one sequence or to one gap, whatever is allocated and freed."""

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.cache.kv_pool import KVPool, zeros
from tests.cache.stores import filled

SLOTS = 24
SLOT_BYTES = 8 * 4 + 6 * 4 + 4 + 4


def pool(max_bytes, dtype=torch.float32):
    like, _ = filled("dense", [1, 1], value_size=6, dtype=dtype)
    return KVPool(like, max_bytes)


def gaps(owners):
    """Lengths of the runs of slots without an owner."""
    lengths, run = [], 0
    for owner in [*owners, "end"]:
        if owner is None:
            run += 1
        elif run:
            lengths.append(run)
            run = 0
    return lengths


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(1, SLOTS + 1), st.tuples(st.just("free"), st.integers(0, 20))), max_size=40))
def test_every_slot_has_one_owner_and_gaps_merge(actions):
    tested = pool(SLOTS * SLOT_BYTES)
    assert tested.slots == SLOTS
    owners, extents = [None] * SLOTS, {}
    for action in actions:
        if isinstance(action, int):
            fits = any(length >= action for length in gaps(owners))
            start = tested.allocate(action)
            assert (start is not None) == fits
            if start is None:
                continue
            assert owners[start : start + action] == [None] * action
            assert (tested.positions[start : start + action] == -1).all()
            # Somebody else's entries are found here by the next sequence, were they not vacated.
            tested.positions[start : start + action] = 7
            owners[start : start + action] = [start] * action
            extents[start] = action
        elif extents:
            start = sorted(extents)[action[1] % len(extents)]
            tested.free(start)
            owners = [None if owner == start else owner for owner in owners]
            del extents[start]
        assert tested.extents == extents
        assert tested.free_slots == owners.count(None)
    for start in list(extents):
        tested.free(start)
    assert tested.free_slots == SLOTS
    assert tested.allocate(SLOTS) == 0


def test_an_extent_is_freed_once():
    tested = pool(SLOTS * SLOT_BYTES)
    start = tested.allocate(3)
    tested.free(start)
    with pytest.raises(KeyError):
        tested.free(start)
    assert tested.free_slots == SLOTS


@pytest.mark.parametrize(("dtype", "slot_bytes"), [(torch.float32, SLOT_BYTES), (torch.bfloat16, 8 * 2 + 6 * 2 + 8)])
def test_it_holds_as_many_slots_as_the_bytes_allow(dtype, slot_bytes):
    tested = pool(10 * slot_bytes + slot_bytes - 1, dtype)
    assert (tested.slots, tested.slot_bytes) == (10, slot_bytes)
    tensors = tested.keys, tested.values, tested.positions, tested.scores
    assert [tuple(each.shape) for each in tensors] == [(10, 8), (10, 6), (10,), (10,)]
    assert [each.dtype for each in tensors] == [dtype, dtype, torch.int32, torch.float32]
    assert sum(each.nbytes for each in tensors) == 10 * slot_bytes
    assert tested.allocate(11) is None


def test_memory_is_taken_when_it_is_written():
    before = psutil.Process().memory_info().rss
    lazy = zeros(2**25, 8, torch.float32, torch.device("cpu"))
    assert lazy[[0, 2**24, -1]].eq(0).all()
    lazy[2**24] = 1
    assert lazy[2**24 - 1 : 2**24 + 2].sum().item() == 8
    assert psutil.Process().memory_info().rss - before < lazy.nbytes / 8


def test_an_extent_begins_without_what_was_there_before():
    tested = pool(SLOTS * SLOT_BYTES)
    start = tested.allocate(4)
    tested.keys[start : start + 4] = tested.values[start : start + 4] = torch.nan
    tested.free(start)
    assert tested.allocate(6) == start
    assert not tested.keys.any()
    assert not tested.values.any()
