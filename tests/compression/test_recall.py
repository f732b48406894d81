"""The ranking of recall against loops, and the rule as a part of recipes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight import Recipe, VLCache, recipe
from sparsight.compression import BlockBounds, Evict, Exact, LowRank, MergeNearest, Recall
from tests.support import reference


@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 6),
    text=st.integers(0, 6),
    with_grid=st.booleans(),
    height=st.sampled_from([1, 3]),
    width=st.sampled_from([1, 3, 5]),
    share=st.floats(0.05, 1.0),
    recent=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 999),
)
def test_positions_chosen_are_those_of_the_brute_force(
    heads, group, rows, columns, text, with_grid, height, width, share, recent, seed
):
    length, size = rows * columns + text, 4
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, length, size, generator=generator)
    query = torch.randn(heads, group, size, generator=generator)
    kept = max(1, round(share * length))
    grid = torch.arange(rows * columns).view(rows, columns)
    grids = [grid] if with_grid else []
    ranking = Recall(pool=(height, width)).rank(query, (keys,), length, 0.5, grids)
    chosen = Evict(recent=recent).select(ranking, kept)

    for h in range(heads):
        received = [0.0] * length
        for g in range(group):
            logits = [0.5 * float(query[h, g].double() @ key.double()) for key in keys[h]]
            total = math.fsum(map(math.exp, logits))
            received = [sum(pair) for pair in zip(received, (math.exp(each) / total for each in logits), strict=True)]
        score = reference.grid_pooled(received, [each.tolist() for each in grids], height, width)
        score = [round(each / group, 6) for each in score]
        expected = reference.vl_cache_positions(score, kept, recent)
        # Where scores are equal but for rounding, either may be chosen.
        assert [score[j] for j in sorted(expected, key=score.__getitem__)] == pytest.approx(
            sorted(score[j] for j in chosen[h].tolist()), abs=2e-6
        )


@pytest.mark.parametrize("index", [Exact(), BlockBounds(8), LowRank(4, 8)])
def test_a_recipe_with_an_index_survives_json(index):
    made = recipe("sparsight-recall", every=2, index=index, pool=(3, 5))
    assert Recipe.from_json(made.to_json()) == made
    assert made.decode == Recall(2, index, (3, 5), prior=1.0)


def test_any_method_that_evicts_can_recall():
    mixed = VLCache(budget=0.2).combined(decode="recall")
    assert mixed.decode == Recall()
    assert mixed.name == "vl-cache + recall"


def test_merged_entries_cannot_be_recalled():
    with pytest.raises(ValueError, match=r"fetches entries back as they were, but reduction 'merge-nearest' merges"):
        Recipe("mixed", 0.1, VLCache().score, VLCache().allocate, MergeNearest(), Recall())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"index": "exact"}, r"index must be a key index such as Exact\(\), got 'exact'"),
        ({"pool": 2}, "pool must be an odd whole number"),
        ({"pooling": "sum"}, "pooling must be 'max' or 'average', got 'sum'"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Recall(**numbers)
