import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import DistinctValues
from sparsight.compression.distinct_values import distinctness
from sparsight.compression.score import NewQueries, PromptStates
from sparsight.models.prompt import Span


def by_hand(attention, value, vision, weight):
    """The score of one KV head without pooling, from attention ``[group, R, T]`` of the queries that count."""
    count, length = attention.shape[1:]
    shares = [0.5 / count] * (count - 1) + [0.5 + 0.5 / count]
    heads = attention.tolist()
    score = [sum(s * head[i][j] for head in heads for i, s in enumerate(shares)) / len(heads) for j in range(length)]
    seen = [j for j in range(length) if vision[j]]
    if not seen:
        return score
    peak = sum(s * max(head[i][j] for j in seen) for head in heads for i, s in enumerate(shares)) / len(heads)
    center = [sum(value[j][d] for j in seen) / len(seen) for d in range(len(value[0]))]
    distance = {j: math.dist(value[j], center) for j in seen}
    least, most = min(distance.values()), max(distance.values())
    for j in seen:
        score[j] += weight * peak * (distance[j] - least) / (most - least)
    return score


def scored(score, query, key, value, vision, span, chunk=1000, grids=()):
    """What the score makes of a prompt whose queries come in chunks."""
    attention, length = score.accumulator(len(key), span, torch.device("cpu")), span.length
    for first in range(score.queries(span).start - span.start, length, chunk):
        stop = min(first + chunk, length)
        attention.add(NewQueries(query[:, first:stop], key[:, :stop], 0.7))
    always = torch.arange(length) == length - 1
    return score.finish(attention, PromptStates(key, value, vision, grids, 3, always, []))


@settings(deadline=None, max_examples=50)
@given(
    before=st.integers(0, 9),
    image=st.one_of(st.just(0), st.integers(3, 30)),
    after=st.integers(1, 40),
    group=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([1, 7, 64]),
    chunk=st.sampled_from([5, 17, 100]),
    weight=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_score_is_that_by_hand(before, image, after, group, window, chunk, weight, seed):
    length, generator = before + image + after, torch.Generator().manual_seed(seed)
    vision = (torch.arange(length) >= before) & (torch.arange(length) < before + image)
    query, key, value = (torch.randn(heads, length, 6, generator=generator) for heads in (2 * group, 2, 2))
    span = Span(7, 7 + before + image, 7 + length)
    own = scored(DistinctValues(window=window, weight=weight), query, key, value, vision, span, chunk)
    logits = query @ key.repeat_interleave(group, 0).mT * 0.7
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)[:, -min(window, after) :].unflatten(0, (2, group))
    expected = [by_hand(*head, vision.tolist(), weight) for head in zip(attention, value.tolist(), strict=True)]
    assert_close(own, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_neighbours_in_the_row_share_attention_but_not_values():
    length, grid = 14, torch.arange(1, 13).view(3, 4)
    vision = (torch.arange(length) >= 1) & (torch.arange(length) < 13)
    key, value, query = torch.zeros(1, length, 2), torch.zeros(1, length, 2), torch.tensor([[[0.0, 9.0]]])
    key[0, 6, 1] = 9.0
    value[0, 11] = 1.0
    score, span = DistinctValues(pool=(1, 3), weight=0.1), Span(0, 13, length)
    attention = score.accumulator(1, span, torch.device("cpu"))
    attention.add(NewQueries(query, key, 1.0))
    own = score.finish(attention, PromptStates(key, value, vision, [grid], 3, torch.arange(length) > 12, []))
    # The query attends to position 6 alone, in the second row of four; the value at 11 is the only different one.
    expected = torch.zeros(1, length)
    expected[0, [5, 6, 7]] = 1.0
    expected[0, 11] = 0.1
    assert_close(own, expected)


def test_equal_values_and_text_are_not_distinct():
    value, vision = torch.rand(2, 1, 4).expand(2, 6, 4), torch.arange(6) < 3
    assert_close(distinctness(value, vision), torch.zeros(2, 6))
    other = torch.cat([value[:, :3], torch.randn(2, 3, 4)], dim=1)
    assert_close(distinctness(other, vision), torch.zeros(2, 6))
    assert_close(distinctness(other, torch.zeros(6, dtype=torch.bool)), torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_in_half_precision_are_compared_in_float32(dtype):
    value, vision = (torch.randn(2, 50, 8) * 1000).to(dtype), torch.arange(50) < 40
    assert torch.equal(distinctness(value, vision), distinctness(value.float(), vision))


@pytest.mark.parametrize(
    ("numbers", "message"), [({"window": 0}, "window"), ({"pool": 2}, "pool"), ({"weight": 2}, "weight")]
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        DistinctValues(**numbers)
