"""The decode rule of TGV-KV."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.compression.eviction import EvictionRule, EvictionState, Rows
from sparsight.models.prompt import Span
from sparsight.utils import checks


@dataclass(frozen=True)
class LastQuery(EvictionRule):
    """Drop the entry that the last token attended to least (TGV-KV, arXiv 2606.03075).

    The sinks and the prompt's text after the image are never dropped, the last token itself only if nothing else may
    go. Before the first token has attended, the recipe's score decides.

    Args:
        sinks: tokens at the prompt's beginning whose entries are never dropped.
        per_head: every KV head drops its own entry; otherwise the heads of a layer, which must hold the same positions,
            drop the one that receives the least on average.
    """

    kind: ClassVar[str] = "last-query"
    tracks_attention: ClassVar[bool] = True
    sinks: int = 4
    per_head: bool = True

    def __post_init__(self) -> None:
        checks.count("sinks", self.sinks)

    def first_scores(self, scores: Tensor, places: Tensor, span: Span) -> Tensor:
        """Infinite scores for entries that are never dropped; the others keep theirs."""
        text = (places >= span.post_vision - span.start) & (places < span.length)
        sinks = (places >= 0) & (places < self.sinks)
        return scores.masked_fill(text | sinks, torch.inf)

    def record(self, scores: Tensor, received: Tensor) -> None:
        """Replace the scores of entries that may be dropped."""
        scores.copy_(torch.where(scores.isinf(), scores, received))

    def protected(self, held: Tensor) -> Tensor:
        """None by number: :meth:`first_scores` marks entries."""
        return torch.zeros_like(held)

    def protect(self, rows: Rows, state: EvictionState, seen: int) -> None:
        """Count the entries marked."""
        state.protected = state.scores.isinf().sum(-1)

    def order(self, rows: Rows, state: EvictionState) -> Tensor:
        """By score, then the last token."""
        scores = state.scores
        if not self.per_head:
            by_head = scores.unflatten(0, (-1, rows.heads))
            scores = by_head.mean(1, keepdim=True).expand_as(by_head).flatten(0, 1)
        last = rows.positions == rows.positions.amax(-1, keepdim=True)
        scores = scores.masked_fill(last & scores.isfinite(), torch.finfo(scores.dtype).max)
        return torch.where(rows.positions >= 0, scores, torch.inf)
