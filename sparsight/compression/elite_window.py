"""The score of AirCache, whose observation window is known only once the prompt is complete."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.compression.score import AttentionSums, BaseScore, Grids, NewQueries
from sparsight.models.prompt import Span
from sparsight.utils import checks

BLOCK_ROWS = 16


@dataclass(frozen=True)
class EliteWindow(BaseScore):
    """Attention of the text that the last token minds most (AirCache, arXiv 2503.23956).

    The elite are the post-vision tokens to which the last one, looking at post-vision tokens alone, pays at least
    ``threshold`` times the most that it pays to any; heads are averaged. A vision token's importance is the attention
    that the elite pay it, looking at vision tokens and the elite alone. The paper compresses vision tokens only: here
    every text token is more important than every vision token, and of two the one that the elite mind more.

    Args:
        threshold: the paper's ``alpha``.
    """

    kind: ClassVar[str] = "elite-window"
    needs_full_prompt: ClassVar[bool] = True
    needs_question: ClassVar[bool] = True
    threshold: float = 0.9

    def __post_init__(self) -> None:
        checks.fraction("threshold", self.threshold)

    def queries(self, span: Span) -> range:
        """Query positions of which some are looked at."""
        return range(span.post_vision, span.stop)

    def accumulator(self, heads: int, span: Span, device: torch.device) -> "EliteQueries":
        """The queries themselves: which of them are elite the last one decides."""
        return EliteQueries(self, heads, span.length, device)

    def sums(self, query: Tensor, key: Tensor, vision: Tensor, visible: Tensor) -> Tensor:
        """Mean attention that the elite pay each position.

        Args:
            query: ``[H, R, D]``, the post-vision queries, scaled, the last of the ``T`` positions.
            key: ``[H_kv, T, D]``.
            vision: bool ``[T]``.
            visible: bool ``[R, T]``, the keys that each query sees.

        Returns:
            float32 ``[H_kv, T]``; query heads that share a KV head are averaged.
        """
        kv_heads, length, _ = key.shape
        first = length - query.shape[1]
        query = query.unflatten(0, (kv_heads, -1)).float()
        key = key.float()
        among_text = (query[:, :, -1] @ key[:, first:].mT).softmax(-1).mean((0, 1))
        elite = (among_text >= self.threshold * among_text.max()).nonzero()[:, 0]
        looked_at = vision.clone()
        looked_at[first + elite] = True
        sums = torch.zeros(kv_heads, length, device=key.device)
        for rows in elite.split(BLOCK_ROWS):
            logits = query[:, :, rows] @ key[:, None].mT
            weights = logits.masked_fill(~visible[rows], -torch.inf).softmax(-1)
            among_looked_at = weights / (weights * looked_at).sum(-1, keepdim=True)
            sums += torch.where(vision, among_looked_at, weights).mean(1).sum(1)
        return sums / len(elite)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from :meth:`sums`, the vision mask ``[T]`` and the images' grids."""
        return sums + sums.amax(-1, keepdim=True) * ~vision


class WindowQueries(AttentionSums):
    """The queries of an observation window, and which keys each attends to, until the prompt is complete."""

    def __init__(self, heads: int, length: int, device: torch.device) -> None:
        super().__init__(heads, length, device)
        self.length = length
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, new: NewQueries, threshold: float | None = None) -> Tensor | None:
        """Keep queries ``[H, r, D]``; no weights are computed yet, so none are counted."""
        count, keys = new.query.shape[1], new.key.shape[1]
        visible = new.visible
        if visible is None:
            visible = torch.ones(count, keys, dtype=torch.bool, device=new.key.device).tril(keys - count)
        self.parts.append((new.query.float() * new.scaling, functional.pad(visible, (0, self.length - keys))))
        return None

    def collected(self) -> tuple[Tensor, Tensor]:
        """The scaled queries ``[H, R, D]``, and the keys that each attends to, bool ``[R, T]``."""
        queries, visible = zip(*self.parts, strict=True)
        return torch.cat(queries, dim=1), torch.cat(visible)


class EliteQueries(WindowQueries):
    """The queries that the elite are chosen from."""

    def __init__(self, score: EliteWindow, heads: int, length: int, device: torch.device) -> None:
        super().__init__(heads, length, device)
        self.score = score

    def sums(self, key: Tensor, vision: Tensor) -> Tensor:
        """:meth:`EliteWindow.sums` of all queries kept."""
        queries, visible = self.collected()
        return self.score.sums(queries, key, vision, visible)
