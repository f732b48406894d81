"""The score of Sparsight's own method: what the question attends to, and what later questions may read."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.compression.elite_window import BLOCK_ROWS, WindowQueries
from sparsight.compression.score import AttentionSums, BaseScore, Grids, PromptStates, Window, as_window, pooled
from sparsight.models.prompt import Span
from sparsight.utils import checks


@dataclass(frozen=True)
class DistinctValues(BaseScore):
    """Post-vision attention plus, in KV heads that read the image, how distinct the values of vision tokens are.

    The score of position ``j`` in KV head ``h`` is ``pooled(a)[h, j] + weight * p[h] * d[h, j]``. Attention is averaged
    over the query heads of a KV head, and of the post-vision queries the last one counts for one half.

    - ``a[h, j]`` is the attention to ``j`` (see :func:`attention_and_peaks`): what the question needs.
    - ``p[h]`` is the largest weight that a query gives a vision token: high in heads that copy from the image.
    - ``d[h, j]`` is how far the value is from the image's mean value (see :func:`distinctness`): low for background,
      which later questions will not read either; 0 for text.

    Args:
        window: how many of the post-vision queries count, the last ones.
        pool: width of the max-pooling along the sequence, or height and width on the images' patch grids; odd numbers.
        weight: of the second term.
    """

    kind: ClassVar[str] = "distinct-values"
    needs_full_prompt: ClassVar[bool] = True
    needs_question: ClassVar[bool] = True
    window: int = 64
    pool: Window = 1
    weight: float = 0.1

    def __post_init__(self) -> None:
        checks.count("window", self.window, least=1)
        object.__setattr__(self, "pool", as_window(self.pool))
        checks.fraction("weight", self.weight, zero=True)

    def queries(self, span: Span) -> range:
        """Query positions whose attention counts."""
        return range(max(span.post_vision, span.stop - self.window), span.stop)

    def accumulator(self, heads: int, span: Span, device: torch.device) -> WindowQueries:
        """The queries themselves: only the complete prompt says which of its tokens are of images."""
        return WindowQueries(heads, span.length, device)

    def finish(self, attention: AttentionSums, states: PromptStates) -> Tensor:
        """Score ``[H_kv, T]`` of the complete prompt."""
        assert isinstance(attention, WindowQueries)
        received, peaks = attention_and_peaks(*attention.collected(), states.key, states.vision)
        distinct = distinctness(states.value, states.vision)
        return self.importance(received, states.vision, states.grids) + self.weight * peaks[:, None] * distinct

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """The pooled attention ``[H_kv, T]``, of attention ``[H_kv, T]`` and the images' grids."""
        return pooled(sums, self.pool, grids)


def attention_and_peaks(query: Tensor, visible: Tensor, key: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that each key receives, and the largest weight of a vision token; means over queries.

    One half of each mean is the last query's, the other is shared equally by all queries.

    Args:
        query: ``[H, R, D]``, scaled.
        visible: bool ``[R, T]``, the keys that each query attends to.
        key: ``[H_kv, T, D]``; ``H`` is a multiple of ``H_kv``, whose query heads are averaged.
        vision: bool ``[T]``.

    Returns:
        float32 ``[H_kv, T]`` and ``[H_kv]``.
    """
    kv_heads, length, _ = key.shape
    count = query.shape[1]
    query, key = query.unflatten(0, (kv_heads, -1)), key.float()
    shares = torch.full((count, 1), 0.5 / count, device=key.device)
    shares[-1] += 0.5
    received, peaks = torch.zeros(kv_heads, length, device=key.device), torch.zeros(kv_heads, device=key.device)
    for first in range(0, count, BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        logits = query[:, :, rows] @ key[:, None].mT
        weights = logits.masked_fill_(~visible[rows], -torch.inf).softmax(-1).mul_(shares[rows])
        received += weights.mean(1).sum(1)
        peaks += weights.mul_(vision).amax(-1).mean(1).sum(1)
    return received, peaks


def distinctness(value: Tensor, vision: Tensor) -> Tensor:
    """Distance of each vision token's value from their mean, scaled to [0, 1] in each KV head; 0 for text.

    Args:
        value: ``[H_kv, T, D]``.
        vision: bool ``[T]``.

    Returns:
        float32 ``[H_kv, T]``.
    """
    value = value.float()
    mean = (value * vision[:, None]).sum(1, keepdim=True) / vision.sum().clamp(min=1)
    distance = (value - mean).norm(dim=-1)
    low, high = (distance.masked_fill(~vision, end) for end in (torch.inf, -torch.inf))
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    scaled = (distance - low) / (high - low).clamp(min=torch.finfo(distance.dtype).tiny)
    return torch.where(vision, scaled, 0.0)
