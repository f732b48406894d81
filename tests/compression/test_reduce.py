import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import Evict, MergeNearest, MergeSimilar
from sparsight.compression.reduce import MERGES, ends, nearest_anchor, top_mask, top_positions
from tests.support import reference
from tests.support.released.elastic import elastic_prefill
from tests.support.released.look_m import look_m_merge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def scores(draw):
    """Scores of some heads with many ties, and how many entries stay."""
    heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 7.5]) if draw(st.booleans()) else st.floats(0, 100, width=32)
    rows = [draw(st.lists(values, min_size=length, max_size=length)) for _ in range(heads)]
    return torch.tensor(rows), draw(st.integers(1, length))


@settings(deadline=None)
@given(case=scores(), recent=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_eviction_keeps_what_the_brute_force_keeps(case, recent):
    score, kept = case
    positions = Evict(recent=recent).select(score, kept)
    assert positions.tolist() == [reference.vl_cache_positions(head, kept, recent) for head in score.tolist()]


@settings(deadline=None)
@given(case=scores())
def test_heads_share_one_choice_unless_they_choose_for_themselves(case):
    score, kept = case
    shared = Evict(per_head=False).select(score, kept)
    alone = Evict().select(score.mean(0, keepdim=True), kept)
    assert torch.equal(shared, alone.expand(len(score), -1))


@settings(deadline=None)
@given(case=scores(), shares=st.lists(st.floats(0.01, 1), min_size=3, max_size=3), per_head=st.booleans())
def test_the_mask_has_the_positions_of_each_head(case, shares, per_head):
    score, length = case[0], case[0].shape[1]
    counts = [max(1, round(share * length)) for share in (shares if per_head else shares[:1] * 3)][: len(score)]
    always = torch.stack([ends(count, length, first=1, last=2) for count in counts])
    mask = top_mask(score, counts, always, per_head=per_head)
    for head, (count, own) in enumerate(zip(counts, always, strict=True)):
        positions = top_positions(score, count, own, per_head=per_head)[head]
        assert torch.equal(mask[head].nonzero()[:, 0], positions)


@settings(deadline=None)
@given(
    case=scores(),
    more=st.integers(0, 40),
    recent=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    first=st.integers(0, 6),
    last=st.integers(1, 40),
    per_head=st.booleans(),
)
def test_what_few_entries_keep_is_found_among_what_more_keep(case, more, recent, first, last, per_head):
    score, kept = case
    evict = Evict(recent=recent, first=first, last=last, per_head=per_head)
    outer = evict.select(score, min(kept + more, score.shape[1]))
    inner = evict.select(score.gather(1, outer), kept)
    assert torch.equal(outer.gather(1, inner), evict.select(score, kept))


def test_negative_scores_rank_below_positive_ones():
    score = torch.tensor([[-1.0, 3.0, -0.5, 0.0, -2.0, 9.0]])
    assert top_positions(score, 4, ends(4, 6, first=0, last=1), per_head=True).tolist() == [[1, 2, 3, 5]]


@settings(deadline=None)
@given(case=scores(), protect_first=st.integers(0, 5), dtype=st.sampled_from(DTYPES))
def test_merging_is_the_mean_over_each_bucket_and_leaves_the_protected_entries_alone(case, protect_first, dtype):
    score, kept = case
    states = torch.randn(*score.shape, 4, generator=torch.Generator().manual_seed(score.shape[1])).to(dtype)
    part = MergeNearest(protect_first=protect_first, per_head=True)
    anchors = part.select(score, kept)
    merged, negative = part.apply(states, -states, anchors)
    assert torch.equal(merged, -negative)
    assert merged.dtype == dtype
    first = min(protect_first, kept - 1)
    assert torch.equal(merged[:, :first], states[:, :first])
    assert torch.equal(merged[:, -1], states[:, -1])
    for head in range(len(score)):
        one = score[head].double().numpy()[None, None], *[states[head].double().numpy()[None]] * 2
        positions, expected, _ = elastic_prefill(*one, kept, first)
        assert anchors[head].tolist() == positions
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        assert_close(merged[head].double(), torch.from_numpy(expected[0]), **tolerance)


def test_of_two_equally_near_anchors_an_entry_joins_the_earlier():
    assert nearest_anchor(torch.tensor([[0, 4, 9]]), 10).tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]


def test_eviction_returns_the_states_at_the_positions():
    states = torch.arange(24.0).view(2, 4, 3)
    positions = torch.tensor([[0, 3], [1, 2]])
    keys, values = Evict().apply(states, -states, positions)
    assert torch.equal(keys, torch.stack([states[0, [0, 3]], states[1, [1, 2]]]))
    assert torch.equal(values, -keys)


@settings(deadline=None)
@given(case=scores(), merge=st.sampled_from(MERGES))
def test_dropped_entries_are_merged_into_the_most_similar(case, merge):
    score, kept = case
    states = torch.randn(2, *score.shape, 4, generator=torch.Generator().manual_seed(score.shape[1]))
    part = MergeSimilar(merge=merge, recent=0.5)
    positions = part.select(score, kept)
    assert torch.equal(positions, Evict(recent=0.5).select(score, kept))
    expected = look_m_merge(*states.double().numpy(), positions.tolist(), merge)
    for merged, heads in zip(part.apply(*states, positions), expected, strict=True):
        assert_close(merged, torch.from_numpy(np.stack(heads)).float())


@pytest.mark.parametrize("merge", MERGES)
def test_nothing_is_merged_where_every_entry_stays(merge):
    states = torch.randn(2, 3, 5, 4).bfloat16()
    every = torch.arange(5).expand(3, -1)
    assert all(map(torch.equal, MergeSimilar(merge=merge).apply(*states, every), states))


def test_the_first_and_the_last_entries_stay_as_far_as_they_fit():
    score = torch.arange(10.0).flip(0)[None]
    assert Evict(recent=0, first=2, last=3).select(score, 6).tolist() == [[0, 1, 2, 7, 8, 9]]
    assert Evict(recent=0, first=2, last=3).select(score, 4).tolist() == [[0, 7, 8, 9]]
    assert Evict(recent=0, first=2, last=3).select(score, 2).tolist() == [[8, 9]]


@pytest.mark.parametrize(
    ("part", "numbers"),
    [(Evict, {"recent": 1.1}), (MergeNearest, {"protect_first": -1}), (MergeNearest, {"protect_first": 0.5})],
)
def test_numbers_out_of_range_are_refused(part, numbers):
    with pytest.raises(ValueError, match=f"{next(iter(numbers))} must be"):
        part(**numbers)


def test_a_merge_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="merge must be 'pivotal' or 'averaged' or 'weighted', got 'mean'"):
        MergeSimilar(merge="mean")
