"""Every eviction rule, as slots that are overwritten, against a list from which entries are dropped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.cache.dense_store import DenseStore
from sparsight.cache.step_metadata import StepMetadata
from sparsight.compression import FixedPoint, Grow, HeavyHitter, Sliding
from sparsight.compression.eviction import EvictionState, position_at

STEPS = 60


def dropped_from_a_list(kept, allowance, place, seen=None):
    """Positions held after each step, by dropping from a list: the definition. ``place`` says which entry may go."""
    held = list(range(kept))
    for position in range(seen or kept, (seen or kept) + STEPS):
        while len(held) + 1 > allowance(position + 1) and place(held) is not None:
            del held[place(held)]
        held.append(position)
        yield list(held)


def overwritten_in_slots(rule, kept, ratios, scores=None, seen=None):
    """Positions held by each row after each step, and whether every key lies in the slot of its position."""
    count = len(kept)
    states = torch.zeros(1, count, 1, 1)
    store = DenseStore.allocate(kept, states, states)
    for row, held in enumerate(kept):
        store.fill(row, torch.arange(held)[None, :, None], torch.zeros(1, held, 1), torch.arange(held)[None])
    # Rows that kept less than the longest are those of shorter prompts.
    padding = torch.tensor([float(max(kept) - held) for held in kept])
    seen = seen or max(kept)
    store.flat_positions.copy_(
        torch.where(store.positions >= 0, store.positions + padding.int()[:, None], -1).flatten()
    )
    ratio = torch.tensor(ratios, dtype=torch.float64)
    zeros = torch.zeros(count)
    table = torch.zeros(count, max(store.capacities)) if scores is None else scores(store.positions)
    state = EvictionState(ratio, padding.double(), zeros.double(), zeros.long(), zeros.int(), table)
    rule.protect(store, state, seen)
    step = StepMetadata(rule, 1, count, seen, None, torch.device("cpu"))
    step.add_layer(store, state)
    for position in range(seen, seen + STEPS):
        step.make_room_everywhere(position)
        if rule.tracks_attention:
            state.scores = scores(store.positions)
        step.advance()
        key = (position - padding).view(1, count, 1, 1)
        store.write(key, key, step.row_positions, step.places[0])
        rows = [store.entries(row) for row in range(count)]
        assert store.held.tolist() == [len(positions) for positions, _, _ in rows]
        for (positions, keys, _), missing in zip(rows, padding.tolist(), strict=True):
            assert torch.equal(keys[:, 0], positions.float() - missing)
        yield [(positions - int(missing)).tolist() for (positions, _, _), missing in zip(rows, padding, strict=True)]


def check(rule, kept, ratios, place, scores=None, seen=None):
    """Every row holds what a list of its own would hold."""
    expected = [
        list(dropped_from_a_list(count, lambda tokens, ratio=ratio: ratio * tokens, place(count), seen))
        for count, ratio in zip(kept, ratios, strict=True)
    ]
    for step, rows in enumerate(overwritten_in_slots(rule, kept, ratios, scores, seen)):
        assert rows == [each[step] for each in expected]


ROWS = st.lists(st.tuples(st.integers(1, 20), st.floats(0.01, 1.0)), min_size=1, max_size=3)


def from_place(protected):
    """The entry at a fixed place of the list goes, if there is one."""
    return lambda kept: lambda held: protected(kept) if len(held) > protected(kept) else None


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, distance=st.integers(0, 25), first=st.integers(0, 5))
def test_a_fixed_point_drops_there_and_appends(rows, distance, first):
    kept, ratios = zip(*rows, strict=True)
    rule = FixedPoint(distance=distance, protect_first=first)
    check(rule, kept, ratios, from_place(lambda count: max(count - distance, first)))


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, sinks=st.integers(0, 6))
def test_a_sliding_window_keeps_the_sinks_and_the_most_recent_entries(rows, sinks):
    kept, ratios = zip(*rows, strict=True)
    check(Sliding(sinks=sinks), kept, ratios, from_place(lambda count: sinks))


@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_growing_drops_nothing(rows):
    kept, ratios = zip(*rows, strict=True)
    check(Grow(), kept, ratios, lambda count: lambda held: None)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 20), ratio=st.floats(0.05, 1.0), recent=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_least_attended_entry_before_the_recent_ones_goes(count, ratio, recent, seed):
    # A share of the tokens seen, so that one entry goes at a time.
    seen = math.ceil(count / ratio)
    by_position = torch.rand(seen + STEPS, generator=torch.Generator().manual_seed(seed))

    def place(kept):
        def lowest(held):
            old = held[: len(held) - max(1, round(recent * len(held)))]
            return min(range(len(old)), key=lambda index: by_position[old[index]]) if old else None

        return lowest

    check(HeavyHitter(recent=recent), [count], [ratio], place, lambda positions: by_position[positions.long()], seen)


@pytest.mark.parametrize(("index", "position"), [(0, 0), (3, 6), (4, 50), (6, 52)])
def test_the_position_at_an_index_counts_coming_entries(index, position):
    states = torch.zeros(1, 2, 1, 1)
    store = DenseStore.allocate([4, 2], states, states)
    store.fill(0, torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), 2 * torch.arange(4)[None])
    assert position_at(torch.tensor([index, 0]), store, 50)[0] == position


def test_an_allowance_grows_with_tokens_and_by_whole_turns():
    numbers = [torch.tensor([each], dtype=torch.float64) for each in (0.25, 8, 5)]
    state = EvictionState(*numbers, torch.zeros(1).long(), torch.zeros(1).int(), torch.zeros(1, 0))
    assert math.isclose(state.allowance(28), 0.25 * 20 + 5)


@pytest.mark.parametrize("numbers", [{"distance": -1}, {"protect_first": "one"}])
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match="must be a whole number of at least 0"):
        FixedPoint(**numbers)
    with pytest.raises(ValueError, match="sinks must be a whole number"):
        Sliding(sinks=-1)
