"""Scores: how important each prompt position is.

A score names query rows, whose attention :mod:`sparsight.observe` sums for every KV head, and turns the sums into the
importance that selection goes by. Pooling is a property of a score: a position is as important as the most important
one near it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.parts import check
from sparsight.prompt import Span


@dataclass(frozen=True)
class PostVision:
    """Attention summed over the post-vision queries (VL-Cache, arXiv 2410.23317, section 4.2).

    Args:
        pool: width of the max pooling along the sequence, an odd number; 1 for none.
    """

    kind: ClassVar[str] = "post-vision"
    pool: int = 1

    def __post_init__(self) -> None:
        check.odd("pool", self.pool)

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.post_vision, span.stop)

    def importance(self, sums: Tensor, vision: Tensor) -> Tensor:
        """Score ``[H_kv, T]`` from the attention sums ``[H_kv, T]`` and the vision mask ``[T]``."""
        return max_pool(sums, self.pool)


@dataclass(frozen=True)
class Accumulated:
    """Attention summed over every query of the prompt (H2O, arXiv 2306.14048; Elastic Cache, arXiv 2407.18121).

    Args:
        pool: width of the max pooling along the sequence, an odd number; 1 for none.
        text_first: every text token is more important than every vision token (LOOK-M, arXiv 2406.18139, section 3.2).
    """

    kind: ClassVar[str] = "accumulated"
    pool: int = 1
    text_first: bool = False

    def __post_init__(self) -> None:
        check.odd("pool", self.pool)

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.start, span.stop)

    def importance(self, sums: Tensor, vision: Tensor) -> Tensor:
        """Score ``[H_kv, T]`` from the attention sums ``[H_kv, T]`` and the vision mask ``[T]``."""
        score = max_pool(sums, self.pool)
        return score + score.amax(-1, keepdim=True) * ~vision if self.text_first else score


@dataclass(frozen=True)
class LastWindow:
    """Attention summed over the last queries, pooled over what comes before them (SnapKV, arXiv 2404.14469).

    Args:
        window: how many queries.
        pool: width of the max pooling along the sequence, an odd number; 1 for none. The window itself is not pooled:
            its own attention would spill over the positions in front of it.
    """

    kind: ClassVar[str] = "last-window"
    window: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        check.count("window", self.window, least=1)
        check.odd("pool", self.pool)

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(max(span.start, span.stop - self.window), span.stop)

    def importance(self, sums: Tensor, vision: Tensor) -> Tensor:
        """Score ``[H_kv, T]`` from the attention sums ``[H_kv, T]`` and the vision mask ``[T]``."""
        before = max(sums.shape[-1] - self.window, 0)
        return torch.cat([max_pool(sums[:, :before], self.pool), sums[:, before:]], dim=-1)


@dataclass(frozen=True)
class Recency:
    """The later, the more important (StreamingLLM, arXiv 2309.17453)."""

    kind: ClassVar[str] = "recency"

    def rows(self, span: Span) -> range:
        """No query is looked at."""
        return range(span.stop, span.stop)

    def importance(self, sums: Tensor, vision: Tensor) -> Tensor:
        """Score ``[H_kv, T]``, of sums of that shape."""
        return torch.arange(sums.shape[-1], dtype=sums.dtype, device=sums.device).expand_as(sums)


@dataclass(frozen=True)
class Random:
    """Chance, as a control; the same for every prompt of a length.

    Args:
        seed: of the random numbers.
    """

    kind: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check.count("seed", self.seed)

    def rows(self, span: Span) -> range:
        """No query is looked at."""
        return range(span.stop, span.stop)

    def importance(self, sums: Tensor, vision: Tensor) -> Tensor:
        """Score ``[H_kv, T]``, of sums of that shape."""
        return torch.rand(sums.shape, generator=torch.Generator().manual_seed(self.seed)).to(sums.device)


def max_pool(score: Tensor, width: int) -> Tensor:
    """The largest score within ``width // 2`` positions of each, ``[H, T]`` of ``[H, T]``."""
    if width == 1 or score.shape[-1] == 0:
        return score
    return functional.max_pool1d(score, width, stride=1, padding=width // 2)
