import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import Accumulated, LastWindow, PostVision, Random, Recency
from sparsight.compression.score import POOLINGS, pooled
from sparsight.models.prompt import Span
from tests.support import reference

SPAN = Span(start=10, post_vision=40, stop=60)
NO_VISION = torch.zeros(50, dtype=torch.bool)


def test_each_score_names_its_queries():
    assert PostVision().queries(SPAN) == range(40, 60)
    assert Accumulated().queries(SPAN) == range(10, 60)
    assert LastWindow(window=7).queries(SPAN) == range(53, 60)
    assert LastWindow(window=70).queries(SPAN) == range(10, 60)
    assert len(Recency().queries(SPAN)) == len(Random().queries(SPAN)) == 0


@settings(deadline=None)
@given(score=st.lists(st.floats(0, 9, width=32), max_size=30), width=st.sampled_from([1, 3, 7, 31]))
def test_pooling_takes_the_largest_score_nearby(score, width):
    half = width // 2
    expected = [max(score[max(0, j - half) : j + half + 1]) for j in range(len(score))]
    assert pooled(torch.tensor([score]), width, [])[0].tolist() == expected


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=3),
    window=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 9])),
    seed=st.integers(0, 99),
)
def test_pooling_on_the_grid_stops_at_the_images_edges(sizes, window, seed):
    # Text, then images that each end their rows with a token of no place, then text.
    grids, length = [], 3
    for rows, columns in sizes:
        grids.append(length + torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns))
        length += rows * (columns + 1)
    score = torch.rand(2, length + 2, generator=torch.Generator().manual_seed(seed))
    expected = score.tolist()
    for head in range(2):
        for grid in grids:
            for y, row in enumerate(grid.tolist()):
                for x, position in enumerate(row):
                    near = [
                        float(score[head, grid[v, u]])
                        for v in range(len(grid))
                        for u in range(grid.shape[1])
                        if abs(v - y) <= window[0] // 2 and abs(u - x) <= window[1] // 2
                    ]
                    expected[head][position] = max(near)
    assert pooled(score, window, grids).tolist() == expected
    # Without a grid the width lies along the sequence.
    assert torch.equal(pooled(score, window, []), pooled(score, window[1], []))


@pytest.mark.parametrize("score", [PostVision(pool=5), Accumulated(pool=5)])
def test_scores_are_pooled(score):
    sums = torch.rand(2, 50)
    assert torch.equal(score.importance(sums, NO_VISION, []), pooled(sums, 5, []))


@settings(deadline=None)
@given(
    length=st.integers(1, 60),
    window=st.integers(1, 40),
    pool=st.sampled_from([1, 5, 7]),
    pooling=st.sampled_from(POOLINGS),
)
def test_the_last_window_is_pooled_in_front_of_it_only(length, window, pool, pooling):
    sums = torch.rand(1, length, generator=torch.Generator().manual_seed(length))
    score = LastWindow(window=window, pool=pool, pooling=pooling).importance(sums, NO_VISION, [])
    before = max(length - window, 0)
    expected = reference.window_pooled(sums[0].tolist(), window, pool, pooling)
    assert_close(score[0, :before].tolist(), expected[:before])
    assert torch.equal(score[0, before:], sums[0, before:])


def test_text_comes_first_and_keeps_its_order():
    sums = torch.tensor([[5.0, 1, 3, 2, 4]])
    vision = torch.tensor([True, False, True, False, True])
    score = Accumulated(text_first=True).importance(sums, vision, [])
    assert score[0].argsort(descending=True).tolist() == [3, 1, 0, 4, 2]


def test_recency_ranks_by_position():
    assert Recency().importance(torch.rand(2, 4), NO_VISION, []).tolist() == [[0, 1, 2, 3]] * 2


def test_chance_is_the_same_for_the_same_seed_and_differs_by_head():
    sums = torch.zeros(2, 50)
    assert torch.equal(Random(3).importance(sums, NO_VISION, []), Random(3).importance(sums, NO_VISION, []))
    first, second = Random(3).importance(sums, NO_VISION, [])
    assert not torch.equal(first, second)
    assert not torch.equal(Random(4).importance(sums, NO_VISION, [])[0], first)


@pytest.mark.parametrize(
    ("score", "numbers", "message"),
    [
        (PostVision, {"pool": 4}, "pool must be an odd whole number"),
        (Accumulated, {"pool": 0}, "pool must be an odd whole number"),
        (LastWindow, {"window": 0}, "window must be a whole number of at least 1"),
        (Random, {"seed": -1}, "seed must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused(score, numbers, message):
    with pytest.raises(ValueError, match=message):
        score(**numbers)


@given(length=st.integers(1, 30), width=st.sampled_from([1, 3, 5]))
def test_average_pooling_counts_what_lies_beyond_an_edge_as_zero(length, width):
    score = torch.rand(2, length, dtype=torch.float64)
    expected = [
        [sum(row[max(0, j - width // 2) : j + width // 2 + 1]) / width for j in range(length)] for row in score.tolist()
    ]
    assert torch.allclose(pooled(score, width, [], "average"), torch.tensor(expected, dtype=torch.float64))
    grid = torch.arange(length)[:, None]
    assert torch.allclose(pooled(score, (width, 1), [grid], "average"), torch.tensor(expected, dtype=torch.float64))


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling must be 'max' or 'average', got 'min'"):
        PostVision(pooling="min")
