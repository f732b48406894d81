import statistics

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import BACON, Accumulated, LastWindow, PostVision
from sparsight.compression.bacon_score import with_evidence
from sparsight.compression.score import NewQueries, PromptStates
from sparsight.models.prompt import Span


def by_hand(window, evidence, earlier, competing, region):
    """BACON for one KV head, from lists."""
    length = len(window)
    added = []
    for j in range(length):
        near = sum(evidence[i] for i in range(max(0, j - 2), min(length, j + 3))) / 5
        persistent = sum(layer[j] for layer in earlier) / len(earlier) if earlier else 0.0
        added.append(evidence[j] + near + persistent)
    top, most = (sorted((each[j] for j in competing), reverse=True)[:region] for each in (window, added))
    if not region or not any(most):
        return window
    strength = 0.5 * statistics.pstdev(top) / (statistics.pstdev(most) + 1e-8)
    strength *= min(statistics.fmean(most) / statistics.fmean(top), 1)
    return [b + strength * v for b, v in zip(window, added, strict=True)]


@settings(deadline=None)
@given(
    length=st.integers(1, 30),
    open_ones=st.integers(0, 30),
    region=st.integers(0, 40),
    layers=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_each_head_is_calibrated_as_by_hand(length, open_ones, region, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    window, evidence = torch.rand(2, 2, length, generator=generator, dtype=torch.float64)
    evidence = (evidence - 0.5).relu()
    earlier = torch.rand(layers, 2, length, generator=generator, dtype=torch.float64)
    competing = torch.randperm(length, generator=generator)[:open_ones]
    region = min(region, len(competing))
    expected = [
        by_hand(window[h].tolist(), evidence[h].tolist(), earlier[:, h].tolist(), competing.tolist(), region)
        for h in range(2)
    ]
    own = with_evidence(window, evidence, list(earlier), competing, region)
    assert_close(own, torch.tensor(expected, dtype=torch.float64))


def finished(score, attention, states):
    """A layer's score from attention ``[H_kv, T, T]``, block by block of queries."""
    span = Span(0, len(states.vision) // 2, len(states.vision))
    sums = score.accumulator(len(attention), span, torch.device("cpu"))
    rows = score.queries(span)
    for first in range(rows.start, rows.stop, 4):
        block = range(first, min(first + 4, rows.stop))
        # With unit keys, the logits are the queries.
        logits = attention[:, block.start : block.stop, : block.stop].clamp(min=1e-30).log()
        keys = torch.eye(block.stop).expand(len(attention), -1, -1)
        sums.add(NewQueries(logits, keys, 1.0))
    return score.finish(sums, states)


@settings(deadline=None, max_examples=40)
@given(
    score=st.sampled_from([LastWindow(window=4, pool=3), LastWindow(window=9), PostVision(pool=3), Accumulated()]),
    length=st.integers(1, 26),
    kept=st.integers(1, 26),
    layers=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_layers_are_calibrated_one_after_the_other(score, length, kept, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = min(kept, length)
    always = torch.arange(length) >= length - min(4, kept)
    vision = torch.zeros(length, dtype=torch.bool)
    states = PromptStates(*torch.empty(2, 2, length, 1), vision, [], kept, always, [])
    rows = score.queries(Span(0, length // 2, length))
    evidences = []
    for _ in range(layers):
        attention = torch.randn(2, length, length, generator=generator) * 2
        attention = attention.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        window = score.importance(attention[:, rows.start : rows.stop].mean(1), vision, [])
        last = score.importance(attention[:, -1], vision, [])
        evidence = (last - window).relu() * ~always
        competing = (~always).nonzero()[:, 0]
        region = min(max(2 * (kept - int(always.sum())), 1), len(competing))
        expected = with_evidence(window, evidence, evidences[-4:], competing, region)
        evidences.append(evidence)
        assert_close(finished(BACON(score), attention, states), expected, rtol=1e-4, atol=1e-5)
    assert len(states.earlier) == min(layers, 4)
