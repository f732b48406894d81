"""The score of BACON: a window's attention, calibrated with what the last query attends to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.compression.score import (
    Accumulated,
    AttentionSums,
    LastWindow,
    NewQueries,
    PostVision,
    PromptStates,
)
from sparsight.compression.wrapped_score import WrappedScore
from sparsight.models.prompt import Span

LAYERS = 4
"""Earlier layers that evidence is averaged over."""

WIDTH = 5
"""Width of the average pooling of the evidence."""

STRENGTH = 0.5
"""Spread of the added evidence, as a share of the spread of the window's attention."""

REGION = 2
"""How many times the budget the positions are that spreads and means are measured on."""

EPSILON = 1e-8
"""What the released code adds to denominators."""


@dataclass(frozen=True)
class BACON(WrappedScore):
    """A window's attention plus what the last query attends to more (BACON, arXiv 2606.14782): ``BACON(PostVision())``.

    Args:
        score: attention summed over a window of queries: ``last-window``, ``post-vision`` or ``accumulated``.

    Raises:
        ValueError: the score is another one.
    """

    kind: ClassVar[str] = "bacon"
    needs_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.score, LastWindow | PostVision | Accumulated):
            kind = getattr(self.score, "kind", self.score)
            raise ValueError(
                f"Score {self.kind!r} calibrates the attention of a window of queries, which {kind!r} is not: take "
                "last-window, post-vision or accumulated."
            )

    def accumulator(self, heads: int, span: Span, device: torch.device) -> "WindowAndLastQuery":
        """What collects the attention of all queries and that of the last one."""
        return WindowAndLastQuery(heads, span.length, device)

    def finish(self, attention: AttentionSums, states: PromptStates) -> Tensor:
        """Score ``[H_kv, T]`` of the complete prompt; its evidence is left for the next layers."""
        assert isinstance(attention, WindowAndLastQuery)
        window, last = (
            self.importance(sums, states.vision, states.grids)
            for sums in (attention.total / attention.count, attention.last.total)
        )
        competing = (~states.always).nonzero()[:, 0].to(window.device, non_blocking=True)
        evidence = torch.zeros_like(window)
        evidence[:, competing] = (last - window)[:, competing].relu()
        region = min(max(REGION * (states.kept - int(states.always.sum())), 1), len(competing))
        calibrated = with_evidence(window, evidence, states.earlier[-LAYERS:], competing, region)
        states.earlier.append(evidence)
        del states.earlier[:-LAYERS]
        return calibrated


class WindowAndLastQuery(AttentionSums):
    """Attention that each position received from a window of queries, and from the last of them.

    Attributes:
        count: queries so far.
        last: the attention of the last one so far.
    """

    def __init__(self, heads: int, length: int, device: torch.device) -> None:
        super().__init__(heads, length, device)
        self.count = 0
        self.last = AttentionSums(heads, length, device)

    def add(self, new: NewQueries, threshold: float | None = None) -> Tensor | None:
        """:meth:`AttentionSums.add`."""
        self.count += new.query.shape[1]
        self.last = AttentionSums(len(self.total), self.total.shape[1], self.total.device)
        self.last.add(new.since(new.query.shape[1] - 1))
        return super().add(new, threshold)


def with_evidence(
    window: Tensor, evidence: Tensor, earlier: Sequence[Tensor], competing: Tensor, region: int
) -> Tensor:
    """``B + lambda V`` (BACON), ``[H_kv, T]``.

    ``V`` is the evidence, plus its average over neighbours, plus its mean over the earlier layers. ``lambda`` is
    ``0.5 sd(B) / sd(V) clamp(mean(V) / mean(B), 0, 1)`` over the ``region`` largest of each.

    Args:
        window: ``B``, mean attention of the window's queries, pooled, ``[H_kv, T]``.
        evidence: ``E``, by how much the last query's attention is more, ``[H_kv, T]``.
        earlier: the evidence of the layers before this one, nearest last.
        competing: the positions that do not stay anyway, int64 ``[n]``.
        region: how many positions spreads and means are measured on, at most ``n``.
    """
    if not region:
        return window
    near = functional.avg_pool1d(evidence, WIDTH, stride=1, padding=WIDTH // 2)
    persistent = sum((each.to(evidence.device) for each in earlier), torch.zeros_like(evidence)) / max(len(earlier), 1)
    added = evidence + near + persistent
    largest, most = (each[:, competing].topk(region).values for each in (window, added))
    spread, most_spread = (each.std(-1, correction=0, keepdim=True) for each in (largest, most))
    presence = (most.mean(-1, keepdim=True) / (largest.mean(-1, keepdim=True) + EPSILON)).clamp(0, 1)
    return window + STRENGTH * spread / (most_spread + EPSILON) * presence * added
