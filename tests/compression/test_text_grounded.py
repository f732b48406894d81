import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import TextGrounded, TextVision
from sparsight.compression.allocate import LayerStatistics
from sparsight.compression.score import NewQueries
from sparsight.models.prompt import Span


def by_hand(attention, vision, first):
    """TGV-KV's score of each position ``[T]``, from attention ``[H, T, T]`` and the first post-vision query."""
    mean = attention.double().mean(0).tolist()
    length = len(mean)
    text = range(first, length)
    count = len(text)
    weights = [sum(mean[i][j] for i in text if i >= j) / (count - number) for number, j in enumerate(text)]
    of_vision = [sum(w * mean[i][j] for w, i in zip(weights, text, strict=True)) for j in range(length)]
    of_text = [sum(mean[i][j] for i in range(length)) for j in range(length)]
    chosen = [v if seen else t for v, t, seen in zip(of_vision, of_text, vision, strict=True)]
    return [s + (0 if seen else max(chosen)) for s, seen in zip(chosen, vision, strict=True)]


@settings(deadline=None, max_examples=50)
@given(
    before=st.integers(0, 9),
    image=st.integers(0, 30),
    after=st.integers(1, 40),
    group=st.sampled_from([1, 2, 4]),
    chunk=st.sampled_from([5, 17, 100]),
    seed=st.integers(0, 99),
    masked=st.booleans(),
)
def test_the_score_is_that_by_hand(before, image, after, group, chunk, seed, masked):
    length, generator = before + image + after, torch.Generator().manual_seed(seed)
    vision = (torch.arange(length) >= before) & (torch.arange(length) < before + image)
    query, key = (torch.randn(heads, length, 6, generator=generator) for heads in (2 * group, 2))
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if masked:
        # The image's tokens attend to each other.
        visible |= vision & vision[:, None]
    logits = query @ key.repeat_interleave(group, 0).mT * 0.7
    attention = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    span = Span(7, 7 + before + image, 7 + length)
    score = TextGrounded()
    sums = score.accumulator(2, span, torch.device("cpu"))
    for first in range(0, length, chunk if not masked else length):
        stop = min(first + chunk, length) if not masked else length
        mask = visible[first:stop, :stop] if masked else None
        sums.add(NewQueries(query[:, first:stop], key[:, :stop], 0.7, mask))
    own = score.importance(sums.sums(key, vision), vision, [])
    expected = torch.tensor(by_hand(attention, vision.tolist(), before + image), dtype=torch.float32)
    assert_close(own, expected.expand(2, -1), rtol=1e-4, atol=1e-5)
    if image:
        assert not vision.all() and own[:, vision].max() <= own[:, ~vision].min()


def layer(to_vision):
    nowhere = torch.zeros(10, dtype=torch.bool)
    return LayerStatistics(torch.zeros(2, 10), 0.0, nowhere, nowhere, torch.tensor(to_vision))


@pytest.mark.parametrize(
    ("paid", "budget", "shares"),
    [
        ([1.0, 2.0, 3.0], 0.2, [0.1, 0.2, 0.3]),
        ([1.0, 1.0, 8.0], 0.5, [0.25, 0.25, 1.0]),
        ([0.0, 0.0], 0.3, [0.3, 0.3]),
        ([0.0, 4.0], 1.0, [1.0, 1.0]),
    ],
)
def test_layers_share_by_the_attention_that_text_pays_to_vision(paid, budget, shares):
    assert TextVision().shares([layer(each) for each in paid], budget) == pytest.approx(shares, abs=1e-6)
