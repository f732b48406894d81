from dataclasses import dataclass, replace

import torch
from torch.testing import assert_close

from sparsight import VLCache
from sparsight.cache.prefill import Prefill
from sparsight.compression.score import BaseScore
from sparsight.models.prompt import Prompt, Span


@dataclass(frozen=True)
class Middle(BaseScore):
    """Attention of queries in the middle of a prompt that attend to later keys too."""

    kind = "middle"

    def queries(self, span):
        return range(span.start + 2, span.start + 5)

    def importance(self, sums, vision, grids):
        return sums


def test_queries_in_the_middle_see_later_keys_where_the_mask_says_so():
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, heads, 9, 4, generator=generator) for heads in (4, 2, 2))
    spans = (Span(1, 6, 9), Span(0, 7, 8))
    prompt = Prompt(torch.zeros(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool), spans, ((), ()))
    # The first six tokens see each other.
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[:6, :6] = True
    prefill = Prefill(replace(VLCache(), score=Middle()), prompt, keys, values)
    prefill.observe(query, 0.5, visible[None, None])
    prefill.finish()
    for row, span in enumerate(spans):
        valid = slice(span.start, span.stop)
        seen = visible[valid, valid]
        logits = query[row, :, valid] @ keys[row, :, valid].repeat_interleave(2, dim=0).mT * 0.5
        attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        assert_close(prefill.scores[row], attention[:, 2:5].sum(1).unflatten(0, (2, 2)).mean(1))
        post = attention[:, span.post_vision - span.start :]
        seen = seen[span.post_vision - span.start :]
        zeroed = (post < 0.01 * post.amax(-1, keepdim=True)) & seen
        assert prefill.zeroed[row] == zeroed.sum()
        assert prefill.visible[row] == 4 * seen.sum()
