"""The rule that drops what the last token attended to least, as slots that are overwritten, against lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight import TGVKV, Recipe
from sparsight.cache.dense_store import DenseStore
from sparsight.cache.step_metadata import StepMetadata
from sparsight.compression import LastQuery
from sparsight.compression.eviction import EvictionState
from sparsight.models.prompt import Span

HEADS, STEPS = 2, 40


def dropped_from_lists(rule, kept, scores, span, ratio, received):
    """Positions that each head of a sequence holds after each step, by dropping from lists: the definition."""
    held = [list(positions) for positions in kept]
    last = [{place: float(score[place]) for place in positions} for positions, score in zip(kept, scores, strict=True)]

    def may_go(positions):
        unmarked = [p for p in sorted(positions) if p >= rule.sinks and not span.post_vision <= p < span.length]
        return [p for p in unmarked if p != max(positions)] or unmarked

    for step in range(STEPS):
        position = span.length + step
        for head in range(HEADS):
            averaged = [head] if rule.per_head else range(HEADS)
            while len(held[head]) + 1 > ratio * (position + 1) and may_go(held[head]):
                sums = {place: sum(last[other][place] for other in averaged) for place in may_go(held[head])}
                held[head].remove(min(sums, key=sums.get))
        for head in range(HEADS):
            held[head].append(position)
            last[head] = {place: float(received[step, head, place]) for place in held[head]}
        yield [sorted(positions) for positions in held]


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(6, 30),
    text=st.integers(1, 6),
    kept=st.integers(3, 30),
    ratio=st.floats(0.05, 1.0),
    sinks=st.integers(0, 4),
    per_head=st.booleans(),
    seed=st.integers(0, 999),
)
def test_each_head_holds_what_a_list_would_hold(length, text, kept, ratio, sinks, per_head, seed):
    generator = torch.Generator().manual_seed(seed)
    rule, span, kept = LastQuery(sinks, per_head), Span(0, length - text, length), min(kept, length)
    orders = [torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(HEADS)]
    positions = torch.stack(orders if per_head else [orders[0]] * HEADS)
    scores = torch.rand(HEADS, length, generator=generator)
    received = torch.rand(STEPS, HEADS, length + STEPS, generator=generator)

    states = torch.zeros(1, HEADS, 1, 1)
    store = DenseStore.allocate([kept] * HEADS, states, states)
    store.fill(0, positions[..., None].float(), torch.zeros(HEADS, kept, 1), positions)
    zeros = torch.zeros(HEADS)
    first = rule.first_scores(scores.gather(1, store.positions.clamp(min=0).long()), store.positions, span)
    state = EvictionState(zeros.double() + ratio, zeros.double(), zeros.double(), zeros.long(), zeros.int(), first)
    rule.protect(store, state, length)
    step = StepMetadata(rule, 1, HEADS, length, None, torch.device("cpu"))
    step.add_layer(store, state)
    expected = dropped_from_lists(rule, positions.tolist(), scores, span, ratio, received)
    for number, held in enumerate(expected):
        step.make_room_everywhere(length + number)
        step.advance()
        key = torch.full((1, HEADS, 1, 1), float(length + number))
        store.write(key, key, step.row_positions, step.places[0])
        state.scores.scatter_(1, step.slots[0][:, None], 0)
        rule.record(state.scores, received[number].gather(1, store.positions.clamp(min=0).long()))
        own = [store.entries(row)[0].tolist() for row in range(HEADS)]
        assert [sorted(places) for places in own] == held


def test_heads_can_only_drop_one_position_if_they_hold_the_same():
    with pytest.raises(ValueError, match=r"'last-query' as configured drops one .* give the reduction per_head=Fa"):
        TGVKV().combined(reduce="evict")
    mixed = TGVKV().combined(reduce="evict", decode="last-query")
    assert mixed.decode == LastQuery(sinks=4, per_head=True)
    assert Recipe.from_json(TGVKV(sinks=2).to_json()) == TGVKV(sinks=2)
