import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.cache.dense_store import DenseStore
from sparsight.compression import FixedPoint, Sliding
from sparsight.compression.eviction import drops, slot_to_write


def ring(kept, steps, allowance, fixed):
    """Positions held after each step, by dropping from a list: the definition."""
    held = list(range(kept))
    for position in range(kept, kept + steps):
        while len(held) + 1 > allowance(position + 1) and len(held) > fixed:
            del held[fixed]
        held.append(position)
        yield list(held)


@settings(max_examples=50, deadline=None)
@given(
    kept=st.integers(1, 20), share=st.floats(0.01, 1.0), distance=st.integers(0, 25), protect_first=st.integers(0, 5)
)
def test_overwriting_one_slot_is_dropping_at_the_fixed_point_and_appending(kept, share, distance, protect_first):
    rule = FixedPoint(distance=distance, protect_first=protect_first)
    fixed = max(kept - distance, protect_first)
    check_slots(rule, kept, share, ring(kept, 60, lambda tokens: share * tokens, fixed))


@settings(max_examples=50, deadline=None)
@given(kept=st.integers(1, 20), share=st.floats(0.01, 1.0), sinks=st.integers(0, 6))
def test_a_sliding_window_keeps_the_sinks_and_the_most_recent_entries(kept, share, sinks):
    steps = list(ring(kept, 60, lambda tokens: share * tokens, sinks))
    check_slots(Sliding(sinks=sinks), kept, share, steps)
    assert len(steps[-1]) <= max(share * (kept + 60), sinks + 1)
    recent = len(steps[-1]) - min(sinks, len(steps[-1]))
    assert steps[-1][-recent:] == list(range(kept + 60 - recent, kept + 60))


def check_slots(rule, kept, share, expected_steps):
    states = torch.zeros(1, 1, kept, 1)
    entries = DenseStore.allocate([kept], states, states)
    entries.fill(0, states[0], states[0], torch.arange(kept)[None])
    fixed = rule.fixed_index(kept)
    fixed_positions = entries.positions_at([fixed], next_position=kept)
    for step, expected in enumerate(expected_steps):
        position = kept + step
        entries.reserve(1)
        gone = drops(entries.held[0], share * (position + 1), fixed)
        for _ in range(gone - 1):
            entries.vacate(slot_to_write(entries.positions, fixed_positions, torch.tensor([False])), [True])
        slots = slot_to_write(entries.positions, fixed_positions, torch.tensor([gone == 0]))
        key = torch.full((1, 1, 1, 1), float(position))
        entries.overwrite(key, key, position, slots, [gone == 0])
        positions = entries.positions[0, 0]
        assert sorted(positions[positions >= 0].tolist()) == expected
        assert entries.held == [len(expected)]
        # Every new key lies in its position's slot.
        new = positions >= kept
        assert torch.equal(entries.keys[0, 0, new, 0], positions[new].float())


def test_sequences_grow_and_overwrite_independently_of_each_other():
    positions = torch.tensor([[[0, 5, 6, 7, -1]], [[-1, -1, 3, 8, 9]]], dtype=torch.int32)
    fixed = torch.tensor([[5], [8]], dtype=torch.int32)
    assert slot_to_write(positions, fixed, torch.tensor([False, True])).tolist() == [[1], [0]]
    assert slot_to_write(positions, fixed, torch.tensor([True, False])).tolist() == [[4], [3]]


@pytest.mark.parametrize("numbers", [{"distance": -1}, {"protect_first": "one"}])
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match="must be a whole number of at least 0"):
        FixedPoint(**numbers)
    with pytest.raises(ValueError, match="sinks must be a whole number"):
        Sliding(sinks=-1)
