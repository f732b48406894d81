"""The score and the allocation of TGV-KV: the text after the image decides about the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.compression.allocate import KeepRatio, LayerStatistics, gather_to_cpu, water_fill
from sparsight.compression.elite_window import BLOCK_ROWS, WindowQueries
from sparsight.compression.score import AttentionSums, BaseScore, Grids, NewQueries
from sparsight.models.prompt import Span


@dataclass(frozen=True)
class TextGrounded(BaseScore):
    """Attention of the text after the image, weighted by what that text receives itself (TGV-KV, arXiv 2606.03075).

    See :func:`text_weights` and :func:`weighted_attention`. Every text token is more important than every vision token;
    text is ranked by the attention that it receives from all queries, as in the released code. All KV heads of a layer
    share one score.
    """

    kind: ClassVar[str] = "text-grounded"
    needs_full_prompt: ClassVar[bool] = True
    needs_question: ClassVar[bool] = True

    def queries(self, span: Span) -> range:
        """All query positions: text is ranked by all of them."""
        return range(span.start, span.stop)

    def accumulator(self, heads: int, span: Span, device: torch.device) -> "TextQueries":
        """What collects all queries' attention, and the post-vision queries themselves."""
        return TextQueries(heads, span.length, span.post_vision - span.start, device)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]`` from :meth:`TextQueries.sums`, the vision mask ``[T]`` and the images' grids."""
        return sums + sums.amax(-1, keepdim=True) * ~vision


class TextQueries(AttentionSums):
    """Attention that each position received from all queries, and the post-vision queries until the prompt is complete.

    Args:
        heads: KV heads.
        length: tokens of the sequence.
        first: place of the first post-vision query.
    """

    def __init__(self, heads: int, length: int, first: int, device: torch.device) -> None:
        super().__init__(heads, length, device)
        self.first = first
        self.text = AttentionSums(heads, length, device)
        self.window = WindowQueries(heads, length, device)

    def add(self, new: NewQueries, threshold: float | None = None) -> Tensor | None:
        """:meth:`AttentionSums.add`; the queries are the last ones of the positions of the keys."""
        count = new.query.shape[1]
        before = max(self.first - (new.key.shape[1] - count), 0)
        if before < count:
            late = new.since(before)
            self.text.add(late)
            self.window.add(late)
        return super().add(new, threshold)

    def sums(self, key: Tensor, vision: Tensor) -> Tensor:
        """Of vision tokens the weighted attention of the text, of text tokens that of all queries, ``[H_kv, T]``."""
        weights = text_weights(self.text.total.mean(0)[self.first :])
        of_vision = weighted_attention(*self.window.collected(), key, weights)
        return torch.where(vision, of_vision, self.total.mean(0)).expand_as(self.total)


def text_weights(received: Tensor) -> Tensor:
    """Mean attention that each of ``N`` text tokens receives from the queries from its own on, ``[N]``.

    ``w_j = sum_{i >= j} A_TT[i, j] / (N - j + 1)`` (TGV-KV, text-weighted ranking), from the sums ``[N]``.
    """
    return received / torch.arange(len(received), 0, -1, device=received.device)


def weighted_attention(query: Tensor, visible: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """``sum_i w_i A[i, j]`` with ``A`` averaged over all heads, ``[T]``.

    Args:
        query: ``[H, N, D]``, scaled.
        visible: bool ``[N, T]``, the keys that each query attends to.
        key: ``[H_kv, T, D]``.
        weights: ``[N]``.
    """
    key = key.float()
    query = query.unflatten(0, (len(key), -1))
    sums = torch.zeros(key.shape[1], device=key.device)
    for first in range(0, len(weights), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        logits = query[:, :, rows] @ key[:, None].mT
        attention = logits.masked_fill_(~visible[rows], -torch.inf).softmax(-1).mean((0, 1))
        sums += weights[rows] @ attention
    return sums


@dataclass(frozen=True)
class TextVision:
    """Layers whose text attends more to vision keep more (TGV-KV, arXiv 2606.03075, text-vision budgeting).

    Shares are in proportion to the attention that the post-vision queries pay to vision tokens. What a full layer
    cannot hold goes to the others; in the released code it is lost.
    """

    kind: ClassVar[str] = "text-vision"
    head_wise: ClassVar[bool] = False
    threshold: ClassVar[float | None] = None

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each layer keeps."""
        paid = gather_to_cpu(layer.to_vision for layer in layers).double()
        return water_fill(paid, budget * len(layers), 0.0).tolist()
