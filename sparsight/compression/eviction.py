"""Decode rules: what becomes of each new entry while the answer is generated.

A layer that kept a share of the prompt may hold that share of all tokens seen, but for :class:`Grow`, which appends
every entry: while a new entry would exceed the allowance, an old one is dropped.
Keys carry their rotary position and attention does not care about the order of its entries, so dropping one and
appending the other is overwriting one slot. The entries of a new turn of a conversation are added as they are and raise
the allowance.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.utils import checks


@dataclass(frozen=True)
class Grow:
    """Every new entry is appended."""

    kind: ClassVar[str] = "grow"


@dataclass(frozen=True)
class FixedPoint:
    """Drop the entry at a fixed place (Elastic Cache, arXiv 2407.18121, section 3.3).

    The fixed place is ``distance`` before the end of the entries kept
    after prefill: the oldest part and the most recent part both stay.

    Args:
        distance: entries between the fixed place and the end of what was kept after prefill.
        protect_first: entries at the beginning of the cache that are never dropped.
    """

    kind: ClassVar[str] = "fixed-point"
    distance: int = 25
    protect_first: int = 1

    def __post_init__(self) -> None:
        checks.count("distance", self.distance)
        checks.count("protect_first", self.protect_first)

    def fixed_index(self, held: int) -> int:
        """Index, in order of position, of the oldest of ``held`` entries that may be dropped from now on."""
        return max(held - self.distance, self.protect_first)


@dataclass(frozen=True)
class Sliding:
    """Drop the oldest entry but the first ones (StreamingLLM, arXiv 2309.17453).

    Args:
        sinks: entries at the beginning of the cache that are never dropped.
    """

    kind: ClassVar[str] = "sliding"
    sinks: int = 4

    def __post_init__(self) -> None:
        checks.count("sinks", self.sinks)

    def fixed_index(self, held: int) -> int:
        """Index, in order of position, of the oldest of ``held`` entries that may be dropped from now on."""
        return self.sinks


@dataclass(frozen=True)
class HeavyHitter:
    """Drop the entry that has been attended to least, but the most recent ones (H2O, arXiv 2306.14048, section 4).

    What an entry got during prefill counts, by the recipe's score, and what it gets from every token of the answer.

    Args:
        recent: fraction of the entries held that are the most recent ones and stay.
    """

    kind: ClassVar[str] = "heavy-hitter"
    recent: float = 0.5

    def __post_init__(self) -> None:
        checks.fraction("recent", self.recent, zero=True)

    def fixed_index(self, held: int) -> int:
        """How many of ``held`` entries stay whatever they were attended to, at least the last."""
        return max(1, round(self.recent * held))


DecodeRule = Grow | FixedPoint | Sliding | HeavyHitter


def drops(held: int, allowance: float, protected: int) -> int:
    """How many of ``held`` entries, of which ``protected`` stay, a new one must replace under ``allowance``."""
    return max(0, min(math.ceil(held + 1 - allowance), held - protected))


def slot_to_write(positions: Tensor, fixed_positions: Tensor, grow: Tensor) -> Tensor:
    """Slot that a new entry takes under a rule that drops.

    Sequences that may grow take their first vacant slot, the others overwrite their oldest entry from the fixed
    position on.

    Args:
        positions: ``[B, H_kv, capacity]``, the position of each slot's entry, -1 where it is vacant.
        fixed_positions: ``[B, H_kv]``, the position of the entry at the fixed place.
        grow: bool ``[B]``.

    Returns:
        int64 ``[B, H_kv]``.
    """
    never = torch.iinfo(positions.dtype).max
    oldest = torch.where(positions >= fixed_positions[..., None], positions, never)
    return torch.where(grow[:, None], first_vacant(positions), oldest.argmin(-1))


def slot_of_lowest(positions: Tensor, scores: Tensor, recent: Tensor, grow: Tensor) -> Tensor:
    """Slot that a new entry takes under :class:`HeavyHitter`.

    Sequences that may grow take their first vacant slot, the others overwrite the entry with the lowest score of those
    before the recent ones.

    Args:
        positions: ``[B, H_kv, capacity]``, the position of each slot's entry, -1 where it is vacant.
        scores: ``[B, H_kv, capacity]``, the attention that each slot's entry got.
        recent: int64 ``[B]``, how many entries are recent, at least one.
        grow: bool ``[B]``.

    Returns:
        int64 ``[B, H_kv]``.
    """
    # In order of position vacant slots come first.
    begin = (positions.shape[-1] - recent)[:, None, None].expand(*positions.shape[:2], 1)
    may_go = (positions >= 0) & (positions < positions.sort(-1).values.gather(-1, begin))
    return torch.where(grow[:, None], first_vacant(positions), torch.where(may_go, scores, torch.inf).argmin(-1))


def first_vacant(positions: Tensor) -> Tensor:
    """The first vacant slot, int64 ``[B, H_kv]``, of positions ``[B, H_kv, capacity]``."""
    slots = torch.arange(positions.shape[-1], device=positions.device)
    return torch.where(positions < 0, slots, positions.shape[-1]).argmin(-1)
