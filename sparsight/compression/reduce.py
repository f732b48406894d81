"""Reductions: which entries a KV head keeps, and what becomes of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.utils import checks

MERGES = ("pivotal", "averaged", "weighted")


@dataclass(frozen=True)
class Evict:
    """Keep the first, the most recent and the highest-scored entries, drop the others.

    Args:
        recent: fraction of the kept entries that are the most recent ones (VL-Cache, arXiv 2410.23317: 10 %).
        first: entries at the prompt's beginning that always stay (StreamingLLM's sinks, arXiv 2309.17453).
        last: entries at the prompt's end that always stay, at least one (SnapKV's window, arXiv 2404.14469).
        per_head: every KV head chooses its own entries; otherwise the heads of a layer share one choice.
    """

    kind: ClassVar[str] = "evict"
    merges: ClassVar[bool] = False
    recent: float = 0.1
    first: int = 0
    last: int = 1
    per_head: bool = True

    def __post_init__(self) -> None:
        checks.fraction("recent", self.recent, zero=True)
        checks.count("first", self.first)
        checks.count("last", self.last, least=1)

    def always(self, kept: int, length: int) -> Tensor:
        """Which of ``length`` positions stay whatever their score when ``kept`` do, bool ``[T]``."""
        return ends(kept, length, first=self.first, last=max(self.last, round(self.recent * kept)))

    def select(self, score: Tensor, kept: int) -> Tensor:
        """Positions that stay, int64 ``[H_kv, kept]``, ascending, for a score ``[H_kv, T]``."""
        return top_positions(score, kept, self.always(kept, score.shape[1]), per_head=self.per_head)

    def apply(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that stay, ``[H_kv, kept, D]``, of ``[H_kv, T, D]``."""
        return _gather(keys, positions), _gather(values, positions)


@dataclass(frozen=True)
class MergeNearest:
    """Merge every entry into the nearest anchor by position (Elastic Cache, arXiv 2407.18121, section 3.3).

    The first ``protect_first`` entries and the last one stay unchanged (section 4.1). The highest-scored others are the
    anchors; of two equally near anchors an entry joins the earlier. An anchor's key and value become the mean over its
    bucket, itself included. Where there is no anchor, entries are dropped.

    Args:
        protect_first: entries at the prompt's beginning that always stay, unchanged.
        per_head: every KV head chooses its own anchors; otherwise the heads of a layer share one choice.
    """

    kind: ClassVar[str] = "merge-nearest"
    merges: ClassVar[bool] = True
    protect_first: int = 1
    per_head: bool = False

    def __post_init__(self) -> None:
        checks.count("protect_first", self.protect_first)

    def always(self, kept: int, length: int) -> Tensor:
        """Which of ``length`` positions stay unchanged when ``kept`` stay, bool ``[T]``."""
        return ends(kept, length, first=self.protect_first, last=1)

    def select(self, score: Tensor, kept: int) -> Tensor:
        """Positions that stay, int64 ``[H_kv, kept]``, ascending, for a score ``[H_kv, T]``."""
        return top_positions(score, kept, self.always(kept, score.shape[1]), per_head=self.per_head)

    def apply(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that stay after merging, ``[H_kv, kept, D]``, of ``[H_kv, T, D]``."""
        first, last = min(self.protect_first, positions.shape[1] - 1), keys.shape[1] - 1
        anchors = positions[:, first:-1] - first
        count = anchors.shape[1]
        if count == 0:
            return _gather(keys, positions), _gather(values, positions)
        bucket = nearest_anchor(anchors, last - first)
        merged_keys, merged_values = (
            torch.cat([states[:, :first], bucket_means(states[:, first:last], bucket, count), states[:, last:]], dim=1)
            for states in (keys, values)
        )
        return merged_keys, merged_values


@dataclass(frozen=True)
class MergeSimilar:
    """Merge every dropped entry into the kept one with the most similar key (LOOK-M, arXiv 2406.18139, section 3.3).

    Similarity is the cosine of the keys; of equally similar ones the earlier is taken. Which entries stay is decided as
    in :class:`Evict`. Keys and values merge alike: a kept entry and the dropped ones are added up and divided by their
    number.

    Args:
        merge: what is added for a dropped entry: ``pivotal``, the mean of it and the kept entry (equation 11);
            ``averaged``, itself (equation 10); ``weighted``, itself times the similarity (equation 12).
        recent: fraction of the kept entries that are the most recent ones.
        per_head: every KV head chooses its own entries; otherwise the heads of a layer share one choice.
    """

    kind: ClassVar[str] = "merge-similar"
    merges: ClassVar[bool] = True
    merge: str = "pivotal"
    recent: float = 0.5
    per_head: bool = True

    def __post_init__(self) -> None:
        checks.one_of("merge", self.merge, MERGES)
        checks.fraction("recent", self.recent, zero=True)

    def always(self, kept: int, length: int) -> Tensor:
        """Which of ``length`` positions stay whatever their score when ``kept`` do, bool ``[T]``."""
        return ends(kept, length, first=0, last=max(1, round(self.recent * kept)))

    def select(self, score: Tensor, kept: int) -> Tensor:
        """Positions that stay, int64 ``[H_kv, kept]``, ascending, for a score ``[H_kv, T]``."""
        return top_positions(score, kept, self.always(kept, score.shape[1]), per_head=self.per_head)

    def apply(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that stay after merging, ``[H_kv, kept, D]``, of ``[H_kv, T, D]``."""
        kept = positions.shape[1]
        bucket, similarity = most_similar(keys, positions)
        weights = similarity if self.merge == "weighted" else torch.ones_like(similarity)
        own = torch.ones_like(positions, dtype=weights.dtype)
        if self.merge == "pivotal":
            # Half of each dropped entry, and as often half of the kept one.
            weights, own = weights / 2, (1 + bucket_sizes(bucket, kept)).float() / 2
        weights = weights.scatter(1, positions, own)
        return bucket_means(keys, bucket, kept, weights), bucket_means(values, bucket, kept, weights)


Reduce = Evict | MergeNearest | MergeSimilar


def ends(kept: int, length: int, *, first: int, last: int) -> Tensor:
    """The ``last`` of ``length`` positions, then the ``first``, as far as ``kept`` suffice, bool ``[T]``."""
    # The end goes before the beginning: the model decodes from the last token.
    last = min(last, kept)
    always = torch.zeros(length, dtype=torch.bool)
    always[: min(first, kept - last)] = True
    always[length - last :] = True
    return always


def top_positions(score: Tensor, kept: int, always: Tensor, *, per_head: bool) -> Tensor:
    """Choose ``kept`` positions: those in ``always``, bool ``[T]``, then the highest scores, ties to the later.

    Returns:
        int64 ``[H_kv, kept]``, ascending, for a score ``[H_kv, T]``.
    """
    ranked = _ranked(score, always, per_head=per_head)
    positions = (ranked.topk(kept, sorted=False).values & 0xFFFFFFFF).sort(dim=-1).values
    return positions.expand(len(score), -1)


def top_mask(score: Tensor, kept: Sequence[int], always: Tensor, *, per_head: bool) -> Tensor:
    """Whether :func:`top_positions` chooses a position, bool ``[H_kv, T]``, where head ``h`` keeps ``kept[h]``.

    ``always`` is bool ``[H_kv, T]`` or ``[1, T]``.
    """
    ranked = _ranked(score, always, per_head=per_head).expand_as(score)
    lowest = [head.kthvalue(len(head) - count + 1).values for head, count in zip(ranked, kept, strict=True)]
    return ranked >= torch.stack(lowest)[:, None]


def _ranked(score: Tensor, always: Tensor, *, per_head: bool) -> Tensor:
    """Integers in the order in which positions are chosen, ``[H_kv, T]`` or ``[1, T]``; the lower half is the position.

    Of two equal scores the later position is the greater: the bits of floats are in the order of the floats, for
    negative ones once all but the sign are flipped.
    """
    if not per_head:
        score = score.mean(0, keepdim=True)
    score = score.masked_fill(always.to(score.device, non_blocking=True), torch.inf)
    bits = score.float().view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits << 32) | torch.arange(score.shape[1], device=score.device)


def nearest_anchor(anchors: Tensor, length: int) -> Tensor:
    """Index of the anchor nearest to each position, int64 ``[H, length]``, for ascending anchors ``[H, kept]``."""
    positions = torch.arange(length, device=anchors.device).expand(len(anchors), -1).contiguous()
    # Position j belongs to the later of two neighbouring anchors once it is past the middle between them.
    middles = (anchors[:, :-1] + anchors[:, 1:]).contiguous()
    return torch.searchsorted(middles, 2 * positions)


def most_similar(keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the kept entry whose key is most similar to each entry's, int64 ``[H, T]``, and the cosine ``[H, T]``.

    A kept entry's own is itself.
    """
    heads, length, _ = keys.shape
    unit = functional.normalize(keys.float(), dim=-1)
    anchors = _gather(unit, positions)
    # A few entries at a time: similarities of all with all would be as large as an attention matrix.
    step = max(1, 2**20 // (heads * positions.shape[1]))
    blocks = [(unit[:, start : start + step] @ anchors.mT).max(-1) for start in range(0, length, step)]
    similarity, bucket = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
    own = torch.arange(positions.shape[1], device=keys.device).expand_as(positions)
    return bucket.scatter(1, positions, own), similarity


def bucket_sizes(bucket: Tensor, count: int) -> Tensor:
    """How many entries are in each of ``count`` buckets, int64 ``[H, count]``, for the bucket of each, ``[H, T]``."""
    # Unlike bincount, this does not wait for a GPU.
    return bucket.new_zeros(len(bucket), count).scatter_add_(1, bucket, torch.ones_like(bucket))


def bucket_means(states: Tensor, bucket: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Mean of the states in each of ``count`` buckets, ``[H, count, D]``, of ``[H, T, D]`` in buckets ``[H, T]``.

    With ``weights`` ``[H, T]``, the weighted states are added up and divided by their number.
    """
    heads, _, size = states.shape
    index = (bucket + count * torch.arange(heads, device=states.device)[:, None]).flatten()
    weighted = states.float() if weights is None else states.float() * weights[..., None]
    sums = torch.zeros(heads * count, size, device=states.device).index_add_(0, index, weighted.flatten(0, 1))
    means = sums.view(heads, count, size) / bucket_sizes(bucket, count)[..., None]
    return means.to(states.dtype)


def _gather(states: Tensor, positions: Tensor) -> Tensor:
    """States ``[H, kept, D]`` at ``positions`` ``[H, kept]`` of ``[H, T, D]``."""
    if states.device.type == "cpu":
        # Whole rows, head by head, are copied several times as fast as elements.
        return torch.stack([head.index_select(0, own) for head, own in zip(states, positions, strict=True)])
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
