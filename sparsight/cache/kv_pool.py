"""Storage for the entries of many sequences, which take and return parts of it."""

import bisect
import math

import numpy as np
import torch
from torch import Tensor

from sparsight.cache.kv_store import KVStore
from sparsight.compression.eviction import VACANT


class KVPool:
    """Slots for keys, values and positions: those of a sequence, in all layers and KV heads, are one extent.

    What a sequence will hold at its longest is known once its prompt is compressed, so an extent never grows.

    Args:
        like: a store whose head sizes, dtype and device the pool has.
        max_bytes: the size of the pool.

    Attributes:
        keys: ``[slots, D]``.
        values: ``[slots, D_v]``.
        positions: int32 ``[slots]``, the position of each slot's token, -1 where a slot of a sequence is vacant.
        scores: float32 ``[slots]``, the attention that each slot's entry received, for rules that track it.
        extents: first slot and number of slots of each sequence.
    """

    def __init__(self, like: KVStore, max_bytes: int) -> None:
        device, sizes = like.keys.device, (like.keys.shape[-1], like.values.shape[-1])
        self.slot_bytes = slot_bytes(*sizes, like.keys.dtype)
        self.slots = max_bytes // self.slot_bytes
        self.keys, self.values = (zeros(self.slots, size, like.keys.dtype, device) for size in sizes)
        self.scores = zeros(self.slots, 1, torch.float32, device)[:, 0]
        self.positions = zeros(self.slots, 1, torch.int32, device)[:, 0]
        self.extents: dict[int, int] = {}
        self._free = [(0, self.slots)]

    @property
    def free_slots(self) -> int:
        """Slots that no sequence has."""
        return sum(count for _, count in self._free)

    def allocate(self, count: int) -> int | None:
        """The first slot of a new extent of ``count`` slots, all vacant; None if no gap is that long."""
        for index, (start, gap) in enumerate(self._free):
            if gap >= count:
                self._free[index : index + 1] = [(start + count, gap - count)] if gap > count else []
                self.extents[start] = count
                self.positions[start : start + count] = VACANT
                # Vacant slots are read too, with a weight of 0: what an earlier sequence left there may be a NaN.
                self.keys[start : start + count] = self.values[start : start + count] = 0
                return start
        return None

    def free(self, start: int) -> None:
        """Return the extent that begins at ``start``."""
        count = self.extents.pop(start)
        index = bisect.bisect(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + count:
            count += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            start, before = self._free.pop(index - 1)
            count, index = count + before, index - 1
        self._free.insert(index, (start, count))


def slot_bytes(key_size: int, value_size: int, dtype: torch.dtype) -> int:
    """Bytes of one slot: a key, a value, a position and a score."""
    return (key_size + value_size) * dtype.itemsize + torch.int32.itemsize + torch.float32.itemsize


def zeros(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros ``[rows, size]``; on a CPU no memory is taken until it is written to."""
    if device.type != "cpu":
        return torch.zeros(rows, size, dtype=dtype, device=device)
    # Only NumPy leaves the zeros to the operating system.
    count = math.prod((rows, size, dtype.itemsize))
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(rows, size)
