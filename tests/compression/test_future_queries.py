import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight import CompressedCache, recipe
from sparsight.compression import FutureQueries
from sparsight.compression.future_queries import QueryMoments, expected_attention, rotated_moments
from sparsight.compression.score import NewQueries, PromptStates
from sparsight.models.prompt import Span
from tests.support import models
from tests.support.models import NO_IMAGE, ONE_IMAGE, THREE_IMAGES

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 3),
    parts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    shift=st.sampled_from([0.0, 1000.0]),
)
def test_moments_of_parts_are_those_of_all_queries(group, kv_heads, parts, shift):
    torch.manual_seed(sum(parts))
    query = torch.randn(group * kv_heads, sum(parts), 6, dtype=torch.float64) + shift
    moments = QueryMoments(kv_heads, sum(parts), CPU)
    for part in query.float().split(parts, dim=1):
        moments.add(NewQueries(part, part, 1.0))
    assert_close(moments.mean, query.mean(1).float())
    brute = torch.stack([head.T.cov(correction=0).reshape(6, 6) for head in query])
    # Numbers far from 0 are rounded before any of this.
    assert_close(moments.covariance, brute.float(), rtol=1e-3, atol=1e-3 if shift else 1e-5)


def test_it_is_the_mean_of_the_exponential_over_gaussian_queries():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64) / 3
    mean, key, value = torch.randn(4, dtype=torch.float64), torch.randn(1, 5, 4), torch.randn(1, 5, 3)
    queries = mean + torch.randn(400_000, 4, dtype=torch.float64) @ root.T
    expected = (0.5 * queries @ key[0].double().T).exp().mean(0)
    expected = expected / expected.sum() * value[0].norm(dim=-1)
    score = expected_attention(mean[None].float(), (root @ root.T)[None].float(), key, value, 0.5)
    assert_close(score[0], expected.float(), rtol=0.01, atol=0)


def test_moments_turn_with_their_queries():
    torch.manual_seed(1)
    turn, query = torch.randn(2, 5, 5), torch.randn(2, 40, 5)

    def moments(states):
        return states.mean(1), torch.stack([head.T.cov(correction=0) for head in states])

    rotated = rotated_moments(*moments(query), lambda states: states @ turn.mT)
    for own, brute in zip(rotated, moments(query @ turn.mT), strict=True):
        assert_close(own, brute, rtol=1e-4, atol=1e-4)


def test_sinks_take_no_part_and_come_first():
    score = FutureQueries(sinks=4)
    assert score.queries(Span(3, 20, 30)) == range(7, 30)
    assert score.queries(Span(3, 5, 6)) == range(5, 6)
    sums = []
    for outlier in (0.0, 1e4):
        torch.manual_seed(2)
        query, key, value = torch.randn(4, 9, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
        key[:, :4] += outlier
        moments = score.accumulator(2, Span(0, 9, 9), CPU)
        moments.add(NewQueries(query, key, 8**-0.5))
        states = PromptStates(key, value, torch.zeros(9), [], 9, torch.zeros(9), [], ahead=lambda states, count: states)
        sums.append(score.finish(moments, states))
    assert torch.equal(*sums)
    assert torch.equal(sums[0][:, :4], sums[0][:, 4:].amax(-1, keepdim=True).expand(2, 4))


@pytest.mark.parametrize("sinks", [0, 4])
def test_chunks_give_the_scores_of_the_whole_prompt(sinks):
    for family in ("llava", "qwen2_5_vl"):
        model, inputs = models.model(family), models.inputs(family, ONE_IMAGE, THREE_IMAGES, NO_IMAGE)
        kept = []
        for chunk in (None, 7):
            cache = CompressedCache(model, recipe("expected-attention", budget=0.3, sinks=sinks), inputs)
            models.generate(model, inputs, 3, past_key_values=cache, prefill_chunk_size=chunk)
            kept.append([cache.kept_positions(layer) for layer in range(3)])
        assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def test_a_bounded_prefill_in_chunks_is_refused():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = CompressedCache(model, recipe("expected-attention"), inputs, prefill_bound=2)
    with pytest.raises(ValueError, match="score 'future-queries' needs all of it"):
        models.generate(model, inputs, 1, past_key_values=cache, prefill_chunk_size=7)
