"""Reductions: which entries a KV head keeps, and what becomes of the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.parts import check


@dataclass(frozen=True)
class Evict:
    """Keep the most recent and the highest-scored entries, drop the others (VL-Cache, arXiv 2410.23317, section 4.2).

    Args:
        recent: fraction of the kept entries that are the most recent ones, at least one entry.
        per_head: every KV head chooses its own entries; otherwise the heads of a layer share one choice.
    """

    kind: ClassVar[str] = "evict"
    recent: float = 0.1
    per_head: bool = True

    def __post_init__(self) -> None:
        check.fraction("recent", self.recent, zero=True)

    def select(self, score: Tensor, kept: int) -> Tensor:
        """Positions that stay, int64 ``[H_kv, kept]``, ascending, for a score ``[H_kv, T]``."""
        return top_positions(score, kept, first=0, last=max(1, round(self.recent * kept)), per_head=self.per_head)

    def apply(self, states: Tensor, positions: Tensor) -> Tensor:
        """Keys or values that stay, ``[H_kv, kept, D]``, of ``states`` ``[H_kv, T, D]``."""
        return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


@dataclass(frozen=True)
class MergeNearest:
    """Merge every entry into the nearest anchor by position (Elastic Cache, arXiv 2407.18121, section 3.2).

    Anchors are the first ``protect_first`` entries, the last one, and the highest-scored others; of two equally near
    anchors an entry joins the earlier. An anchor's key and value become the mean over its bucket, itself included.

    Args:
        protect_first: entries at the prompt's beginning that are always anchors.
        per_head: every KV head chooses its own anchors; otherwise the heads of a layer share one choice.
    """

    kind: ClassVar[str] = "merge-nearest"
    protect_first: int = 1
    per_head: bool = False

    def __post_init__(self) -> None:
        check.count("protect_first", self.protect_first)

    def select(self, score: Tensor, kept: int) -> Tensor:
        """Positions of the anchors, int64 ``[H_kv, kept]``, ascending, for a score ``[H_kv, T]``."""
        return top_positions(score, kept, first=self.protect_first, last=1, per_head=self.per_head)

    def apply(self, states: Tensor, positions: Tensor) -> Tensor:
        """Keys or values of the anchors after merging, ``[H_kv, kept, D]``, of ``states`` ``[H_kv, T, D]``."""
        heads, kept = positions.shape
        bucket = nearest_anchor(positions, states.shape[1]) + kept * torch.arange(heads, device=states.device)[:, None]
        bucket = bucket.flatten()
        merged = torch.zeros(heads * kept, states.shape[-1], device=states.device)
        merged.index_add_(0, bucket, states.flatten(0, 1).float())
        merged /= bucket.bincount(minlength=heads * kept)[:, None]
        return merged.unflatten(0, (heads, kept)).to(states.dtype)


def top_positions(score: Tensor, kept: int, *, first: int, last: int, per_head: bool) -> Tensor:
    """Choose ``kept`` positions: the ``last`` ones, the ``first`` ones, then the highest scores, ties to the later.

    Returns:
        int64 ``[H_kv, kept]``, ascending, for a score ``[H_kv, T]``.
    """
    heads, length = score.shape
    if not per_head:
        score = score.mean(0, keepdim=True)
    score = score.clone()
    # Where not all protected positions fit, the end goes before the beginning: the model decodes from the last token.
    last = min(last, kept)
    score[:, : min(first, kept - last)] = torch.inf
    score[:, length - last :] = torch.inf
    # One integer holds score and position, so that of two equal scores the later position is the greater: the bits of
    # floats are in the order of the floats, for negative ones once all but the sign are flipped.
    bits = score.float().view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ranked = (bits << 32) | torch.arange(length, device=score.device)
    positions = (ranked.topk(kept, sorted=False).values & 0xFFFFFFFF).sort(dim=-1).values
    return positions.expand(heads, -1)


def nearest_anchor(anchors: Tensor, length: int) -> Tensor:
    """Index of the anchor nearest to each position, int64 ``[H, length]``, for ascending anchors ``[H, kept]``."""
    positions = torch.arange(length, device=anchors.device).expand(len(anchors), -1).contiguous()
    # Position j belongs to the later of two neighbouring anchors once it is past the middle between them.
    middles = (anchors[:, :-1] + anchors[:, 1:]).contiguous()
    return torch.searchsorted(middles, 2 * positions)


Reduce = Evict | MergeNearest
