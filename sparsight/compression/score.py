"""Scores: how important each prompt position is.

A score names query rows, whose attention :mod:`sparsight.compression.statistics` sums for every KV head, and turns the
sums into the importance that selection goes by. Pooling is a property of a score: a position is as important as the
most important one near it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.models.prompt import Span
from sparsight.utils import checks

Window = int | tuple[int, int]
"""Width along the sequence, or height and width on a grid."""

Grids = Sequence[Tensor]
"""Positions of the vision tokens of images, ``[rows, columns]`` each."""


@dataclass(frozen=True)
class PostVision:
    """Attention summed over the post-vision queries (VL-Cache, arXiv 2410.23317, section 4.2).

    Args:
        pool: width of the max pooling along the sequence, or height and width on the images' patch grids; odd numbers.
    """

    kind: ClassVar[str] = "post-vision"
    pool: Window = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", as_window(self.pool))

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.post_vision, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``, the vision mask ``[T]`` and the images' grids."""
        return pooled(sums, self.pool, grids)


@dataclass(frozen=True)
class Accumulated:
    """Attention summed over every query of the prompt (H2O, arXiv 2306.14048; Elastic Cache, arXiv 2407.18121).

    Args:
        pool: width of the max pooling along the sequence, or height and width on the images' patch grids; odd numbers.
        text_first: every text token is more important than every vision token (LOOK-M, arXiv 2406.18139, section 3.2).
    """

    kind: ClassVar[str] = "accumulated"
    pool: Window = 1
    text_first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", as_window(self.pool))

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.start, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``, the vision mask ``[T]`` and the images' grids."""
        score = pooled(sums, self.pool, grids)
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
    pool: Window = 7

    def __post_init__(self) -> None:
        checks.count("window", self.window, least=1)
        object.__setattr__(self, "pool", as_window(self.pool))

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(max(span.start, span.stop - self.window), span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``, the vision mask ``[T]`` and the images' grids."""
        before = max(sums.shape[-1] - self.window, 0)
        in_front = sums.clone()
        in_front[:, before:] = 0
        return torch.cat([pooled(in_front, self.pool, grids)[:, :before], sums[:, before:]], dim=-1)


@dataclass(frozen=True)
class Recency:
    """The later, the more important (StreamingLLM, arXiv 2309.17453)."""

    kind: ClassVar[str] = "recency"

    def rows(self, span: Span) -> range:
        """No query is looked at."""
        return range(span.stop, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
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
        checks.count("seed", self.seed)

    def rows(self, span: Span) -> range:
        """No query is looked at."""
        return range(span.stop, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]``, of sums of that shape."""
        return torch.rand(sums.shape, generator=torch.Generator().manual_seed(self.seed)).to(
            sums.device, non_blocking=True
        )


def as_window(pool: Any) -> Window:
    """A window that pooling may have, of one side or two; JSON brings two as a list.

    Raises:
        ValueError: a side is no odd number.
    """
    window = tuple(pool) if isinstance(pool, list) else pool
    checks.window("pool", window)
    return window


def pooled(score: Tensor, pool: Window, grids: Grids) -> Tensor:
    """The largest score in a window around each position, ``[H, T]`` of ``[H, T]``.

    A window of two sides lies on the patch grid of the position's image and ends at the image's edges; other positions
    stay as they are. Where there is no grid its width lies along the sequence.

    Args:
        score: ``[H, T]``.
        pool: width along the sequence, or height and width.
        grids: positions ``[rows, columns]`` of each image's vision tokens.
    """
    if isinstance(pool, int) or not grids:
        width = pool if isinstance(pool, int) else pool[1]
        if width == 1 or not score.shape[-1]:
            return score
        return functional.max_pool1d(score, width, stride=1, padding=width // 2)
    score = score.clone()
    for grid in grids:
        score[:, grid] = functional.max_pool2d(score[:, grid], pool, stride=1, padding=[side // 2 for side in pool])
    return score
