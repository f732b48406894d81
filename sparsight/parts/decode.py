"""Decode rules: what becomes of each new entry while the answer is generated."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.parts import check


@dataclass(frozen=True)
class Grow:
    """Every new entry is appended."""

    kind: ClassVar[str] = "grow"


@dataclass(frozen=True)
class FixedPoint:
    """Fixed-point elimination (Elastic Cache, arXiv 2407.18121, section 3.3).

    A layer may hold its share of the tokens seen. While a new entry would exceed that, the entry at a fixed place of
    the cache is dropped, ``distance`` before the end of the entries kept after prefill: the oldest part and the most
    recent part both stay. A key carries its rotary position, so dropping and appending is overwriting one slot.

    Args:
        distance: entries between the fixed place and the end of what was kept after prefill.
        protect_first: entries at the beginning of the cache that are never dropped.
    """

    kind: ClassVar[str] = "fixed-point"
    distance: int = 25
    protect_first: int = 1

    def __post_init__(self) -> None:
        check.count("distance", self.distance)
        check.count("protect_first", self.protect_first)

    def fixed_index(self, held: int) -> int:
        """Index, among ``held`` entries in order of position, of the entry that the next elimination drops."""
        return max(held - self.distance, self.protect_first)

    def drops(self, held: int, allowance: float, fixed_index: int) -> int:
        """How many of ``held`` entries go, so that with a new one ``allowance`` is not exceeded."""
        return max(0, min(math.ceil(held + 1 - allowance), held - fixed_index))


def slot_to_write(positions: Tensor, fixed_positions: Tensor, grow: Tensor) -> Tensor:
    """Slot that a new entry takes under :class:`FixedPoint`.

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
    slots = torch.arange(positions.shape[-1], device=positions.device, dtype=positions.dtype)
    vacant = torch.where(positions < 0, slots, never)
    oldest = torch.where(positions >= fixed_positions[..., None], positions, never)
    return torch.where(grow[:, None, None], vacant, oldest).argmin(-1)


DecodeRule = Grow | FixedPoint
