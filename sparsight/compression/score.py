"""Scores: how important each prompt position is.

A score names queries, accumulates what they say about the keys while the prompt is prefilled, and turns the sums into
the importance that selection goes by. Pooling is a property of a score: a position is as important as the most
important one near it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.compression.attention_statistics import attention_sums
from sparsight.models.prompt import Span
from sparsight.utils import checks

Window = int | tuple[int, int]
"""Width along the sequence, or height and width on a grid."""

POOLINGS = ("max", "average")

Grids = Sequence[Tensor]
"""Positions of the vision tokens of images, ``[rows, columns]`` each."""

Ahead = Callable[[Tensor, int], Tensor]
"""States ``[H, n, D]`` before RoPE, rotated to a number of positions after the prompt and averaged."""


@dataclass(frozen=True)
class PromptStates:
    """What a score can use once the prompt of one sequence is complete.

    Args:
        key: ``[H_kv, T, D]``, after RoPE.
        value: ``[H_kv, T, D]``.
        vision: bool ``[T]``.
        grids: positions of the images' patches.
        kept: entries that each KV head keeps if the budget is shared equally.
        always: bool ``[T]`` on the CPU, the position then stays whatever its score.
        earlier: what the score of each earlier layer has left for the later ones.
        frames: positions of the vision tokens of videos' frames, ``[F, patches]`` each.
        ahead: where the score is of queries before RoPE, what rotates them to the tokens to come.
    """

    key: Tensor
    value: Tensor
    vision: Tensor
    grids: Grids
    kept: int
    always: Tensor
    earlier: list[Tensor]
    frames: Sequence[Tensor] = ()
    ahead: Ahead | None = None


@dataclass(frozen=True)
class NewQueries:
    """Consecutive queries of a sequence, and the keys that they attend to.

    Args:
        query: ``[H, r, D]``.
        key: ``[H_kv, n, D]``.
        scaling: factor of the logits.
        visible: bool ``[r, n]``, which keys each query attends to; None for causal, the last query at the last key.
        places: int64 ``[H_kv, n]``, where the keys are in the sequence, if they are not its first.
    """

    query: Tensor
    key: Tensor
    scaling: float
    visible: Tensor | None = None
    places: Tensor | None = None

    def since(self, first: int) -> "NewQueries":
        """The queries from index ``first`` on."""
        visible = None if self.visible is None else self.visible[first:]
        return replace(self, query=self.query[:, first:], visible=visible)


class AttentionSums:
    """The attention that each position of a sequence received from a score's queries.

    Attributes:
        total: float32 ``[H_kv, T]``.
    """

    def __init__(self, heads: int, length: int, device: torch.device) -> None:
        self.total = torch.zeros(heads, length, device=device)

    def add(self, new: NewQueries, threshold: float | None = None) -> Tensor | None:
        """Add :func:`~sparsight.compression.attention_statistics.attention_sums` of some queries.

        Returns:
            With a threshold, how many of their weights it zeroes.
        """
        sums, zeroed = attention_sums(new.query, new.key, new.scaling, threshold, new.visible)
        if new.places is None:
            self.add_sums(sums)
        else:
            self.total.scatter_add_(1, new.places, sums)
        return zeroed

    def add_sums(self, sums: Tensor) -> None:
        """Add sums ``[H_kv, n]`` of the first positions."""
        self.total[:, : sums.shape[1]] += sums

    def sums(self, key: Tensor, vision: Tensor) -> Tensor:
        """Float32 ``[H_kv, T]``, once the prompt, keys ``[H_kv, T, D]`` and vision mask ``[T]``, is complete."""
        return self.total


class BaseScore(ABC):
    """What the prefill asks of every score.

    Attributes:
        kind: the score's name in a recipe.
        needs_full_prompt: whether nothing can be said before the last token of the prompt.
        before_rope: whether the score's queries are those before RoPE.
        needs_replay: whether the model must process the prompt a second time.
        needs_frames: whether videos' frames must be found in the prompt.
        needs_question: whether the text after the image decides; without it, other queries stand in.
    """

    kind: ClassVar[str]
    needs_full_prompt: ClassVar[bool] = False
    before_rope: ClassVar[bool] = False
    needs_replay: ClassVar[bool] = False
    needs_frames: ClassVar[bool] = False
    needs_question: ClassVar[bool] = False

    @abstractmethod
    def queries(self, span: Span) -> range:
        """Query positions whose attention counts."""

    def within(self, most: int) -> Self:
        """The score with a window of at most ``most`` queries, where it has a window of fixed size."""
        return self

    def accumulator(self, heads: int, span: Span, device: torch.device) -> AttentionSums:
        """What collects the queries' attention for a sequence."""
        return AttentionSums(heads, span.length, device)

    def finish(self, attention: AttentionSums, states: PromptStates) -> Tensor:
        """Score ``[H_kv, T]`` of the complete prompt, from what :meth:`accumulator` collected."""
        return self.importance(attention.sums(states.key, states.vision), states.vision, states.grids)

    @abstractmethod
    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``, the vision mask ``[T]`` and the images' grids."""


@dataclass(frozen=True)
class PostVision(BaseScore):
    """Attention summed over the post-vision queries (VL-Cache, arXiv 2410.23317, section 4.2).

    Args:
        pool: width of the pooling along the sequence, or height and width on the images' patch grids; odd numbers.
        pooling: ``max`` or ``average``.
    """

    kind: ClassVar[str] = "post-vision"
    needs_question: ClassVar[bool] = True
    pool: Window = 1
    pooling: str = "max"

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", as_window(self.pool))
        checks.one_of("pooling", self.pooling, POOLINGS)

    def queries(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.post_vision, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``, the vision mask ``[T]`` and the images' grids."""
        return pooled(sums, self.pool, grids, self.pooling)


@dataclass(frozen=True)
class Accumulated(BaseScore):
    """Attention summed over every query of the prompt (H2O, arXiv 2306.14048; Elastic Cache, arXiv 2407.18121).

    Args:
        pool: width of the pooling along the sequence, or height and width on the images' patch grids; odd numbers.
        pooling: ``max`` or ``average``.
        text_first: every text token is more important than every vision token (LOOK-M, arXiv 2406.18139, section 3.2).
    """

    kind: ClassVar[str] = "accumulated"
    pool: Window = 1
    pooling: str = "max"
    text_first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", as_window(self.pool))
        checks.one_of("pooling", self.pooling, POOLINGS)

    def queries(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.start, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``, the vision mask ``[T]`` and the images' grids."""
        score = pooled(sums, self.pool, grids, self.pooling)
        return score + score.amax(-1, keepdim=True) * ~vision if self.text_first else score


@dataclass(frozen=True)
class LastWindow(BaseScore):
    """Attention summed over the last queries, pooled over what comes before them (SnapKV, arXiv 2404.14469).

    Args:
        window: how many queries.
        pool: width of the pooling along the sequence, an odd number; 1 for none. The window itself is not pooled:
            its own attention would spill over the positions in front of it.
        pooling: ``max``, or ``average`` as by default in the authors' code.
    """

    kind: ClassVar[str] = "last-window"
    needs_question: ClassVar[bool] = True
    window: int = 32
    pool: Window = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        checks.count("window", self.window, least=1)
        object.__setattr__(self, "pool", as_window(self.pool))
        checks.one_of("pooling", self.pooling, POOLINGS)

    def queries(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(max(span.start, span.stop - self.window), span.stop)

    def within(self, most: int) -> Self:
        """The score with a window of at most ``most`` queries."""
        return replace(self, window=min(self.window, most))

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from attention sums ``[H_kv, T]``, the vision mask ``[T]`` and the images' grids."""
        before = max(sums.shape[-1] - self.window, 0)
        in_front = sums.clone()
        in_front[:, before:] = 0
        return torch.cat([pooled(in_front, self.pool, grids, self.pooling)[:, :before], sums[:, before:]], dim=-1)


@dataclass(frozen=True)
class Recency(BaseScore):
    """The later, the more important (StreamingLLM, arXiv 2309.17453)."""

    kind: ClassVar[str] = "recency"

    def queries(self, span: Span) -> range:
        """No query is looked at."""
        return range(span.stop, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]``, of sums of that shape."""
        return torch.arange(sums.shape[-1], dtype=sums.dtype, device=sums.device).expand_as(sums)


@dataclass(frozen=True)
class Random(BaseScore):
    """Chance, as a control; the same for every prompt of a length.

    Args:
        seed: of the random numbers.
    """

    kind: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count("seed", self.seed)

    def queries(self, span: Span) -> range:
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


def pooled(score: Tensor, pool: Window, grids: Grids, pooling: str = "max") -> Tensor:
    """The largest or the average score in a window around each position, ``[H, T]`` of ``[H, T]``.

    A window of two sides lies on the patch grid of the position's image and ends at the image's edges; other positions
    stay as they are. Where there is no grid its width lies along the sequence.

    Args:
        score: ``[H, T]``.
        pool: width along the sequence, or height and width.
        pooling: ``max``, or ``average``, where what lies beyond an edge counts as 0.
        grids: positions ``[rows, columns]`` of each image's vision tokens.
    """
    if isinstance(pool, int) or not grids:
        width = pool if isinstance(pool, int) else pool[1]
        if width == 1 or not score.shape[-1]:
            return score
        along = functional.max_pool1d if pooling == "max" else functional.avg_pool1d
        return along(score, width, stride=1, padding=width // 2)
    on_grid = functional.max_pool2d if pooling == "max" else functional.avg_pool2d
    score = score.clone()
    for grid in grids:
        score[:, grid] = on_grid(score[:, grid], pool, stride=1, padding=[side // 2 for side in pool])
    return score
