"""The interface of a layer's KV store, and what its dense and its ragged form share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsight.attention import kernels
from sparsight.cache.step_metadata import Lengths, writable
from sparsight.compression.eviction import VACANT

LEAST_GROWTH = 16
"""Slots by which storage grows at least when it is full."""


def growth_step(used: int) -> int:
    """Slots by which storage of ``used`` slots grows: an eighth, so that copying costs the same per new token."""
    return max(LEAST_GROWTH, used // 8)


class KVStore(ABC):
    """Keys and values that one layer holds after compression.

    A row is one KV head of one sequence, ``N = B * H_kv`` of them, and has slots of its own. A slot without an entry is
    vacant. Lengths are tensors, so that a decode step reads nothing on the host: once the store is :attr:`static`,
    :meth:`write` and :meth:`attend` can be captured in a CUDA graph or compiled.

    Attributes:
        keys, values: the slots of all rows, ``[..., D]``, contiguous.
        flat_positions: int32 ``[slots]``, the position of each slot's token, -1 where the slot is vacant.
        heads: KV heads.
        starts: int64 ``[N]``, the first slot of each row.
        static: whether the tensors keep their addresses and shapes while single tokens are written.
    """

    keys: Tensor
    values: Tensor
    flat_positions: Tensor
    starts: Tensor

    def __init__(self, heads: int, held: Tensor, used: Tensor) -> None:
        self.heads = heads
        self._set_lengths(held, used)
        self.static = False
        # Tokens that fit in every row without another look at the lengths.
        self._free = 0

    # The lengths of the rows

    @property
    def held(self) -> Tensor:
        """Entries of each row, int64 ``[N]``."""
        return self._lengths.held[self._layer]

    @property
    def used(self) -> Tensor:
        """Slots of each row up to the last occupied one, int64 ``[N]``."""
        return self._lengths.used[self._layer]

    def _set_lengths(self, held: Tensor, used: Tensor) -> None:
        self.share(Lengths(held[None], used[None]), 0)

    def share(self, lengths: Lengths, layer: int) -> None:
        """Have the lengths in those of several layers, which a step updates together."""
        self._lengths, self._layer = lengths, layer

    # The form of the storage

    @classmethod
    @abstractmethod
    def allocate(cls, held: Sequence[int], like_keys: Tensor, like_values: Tensor) -> "KVStore":
        """Vacant storage for ``held[n]`` entries of each row; dtype and shape follow ``[B, H_kv, T, D]``."""

    @property
    @abstractmethod
    def capacities(self) -> list[int]:
        """Slots of each row."""

    @abstractmethod
    def by_row(self, flat: Tensor, vacant: float) -> Tensor:
        """A number of each slot, ``[slots]``, as ``[N, C]``; ``vacant`` behind the last slot of a shorter row."""

    @abstractmethod
    def flattened(self, by_row: Tensor) -> Tensor:
        """The reverse of :meth:`by_row`."""

    @abstractmethod
    def resize(self, extra: Sequence[int]) -> None:
        """Give each row ``extra[n]`` more slots."""

    @abstractmethod
    def select(self, sequences: Tensor) -> None:
        """Replace the sequences by those at ``sequences``, a tensor on the CPU."""

    @abstractmethod
    def attend(self, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """Attention of the newest ``q`` tokens, already written, over all entries held.

        Args:
            query: ``[B, H, q, D]``, ``H`` a multiple of ``H_kv``.
            recent_mask: bool ``[B, 1, q, q]``, which new tokens attend to which; None for causal.
            scaling: factor of the logits, ``D ** -0.5`` if None.

        Returns:
            ``[B, H, q, D]``.
        """

    @abstractmethod
    def attend_and_score(
        self, query: Tensor, recent_mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attend`, and the attention that each slot received, float32 ``[N, C]``.

        Query heads that share a KV head are averaged.
        """

    # Entries that come and go

    def reserve(self, count: int) -> bool:
        """Make room for ``count`` more entries in every row; whether the storage had to grow."""
        grows = self._free < count and self._grow(count)
        self._free -= count
        return grows

    @writable
    def _grow(self, count: int) -> bool:
        """Grow the storage, in steps, until ``count`` more entries fit; whether they did not."""
        used, capacities = self.used.tolist(), self.capacities
        missing = [slots + count - capacity for slots, capacity in zip(used, capacities, strict=True)]
        if max(missing) > 0:
            # The same number everywhere: where every row takes each new entry, all are full at the same time.
            step = growth_step(sum(used) // len(used))
            self.resize([max(slots, step) if slots > 0 else 0 for slots in missing])
        self._free = min(capacity - slots for slots, capacity in zip(used, self.capacities, strict=True))
        return max(missing) > 0

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, places: Tensor) -> None:
        """Write the entries of each sequence's newest token in place; their lengths have been counted already.

        Args:
            keys: ``[B, H_kv, 1, D]``.
            values: ``[B, H_kv, 1, D]``.
            positions: int32 ``[N]``.
            places: int64 ``[N]``, where in the storage each row's entry goes.
        """
        own_keys, own_values, own_positions = self.flat()
        own_keys.index_copy_(0, places, keys.flatten(0, 2))
        own_values.index_copy_(0, places, values.flatten(0, 2))
        own_positions.index_copy_(0, places, positions)

    def append(self, keys: Tensor, values: Tensor, position: int, valid: Tensor | None = None) -> None:
        """Append entries ``[B, H_kv, q, D]`` at consecutive positions; bool ``valid`` ``[B, q]`` excludes padding."""
        count = keys.shape[2]
        self.reserve(count)
        new = torch.arange(count, device=keys.device)
        end = self._end()
        places = ((self.starts + end)[:, None] + new).flatten()
        positions = (new + position).expand(len(self.held), -1)
        if valid is not None:
            positions = positions.where(valid.repeat_interleave(self.heads, 0), VACANT)
        added = keys.flatten(0, 2), values.flatten(0, 2), positions.flatten().int()
        for states, more in zip(self.flat(), added, strict=True):
            states.index_copy_(0, places, more)
        with torch.inference_mode(False):
            self._set_lengths((self.positions != VACANT).sum(-1), end + count)

    def _end(self) -> Tensor:
        """Where :meth:`append` begins, int64 ``[N]``."""
        return self.used

    @writable
    def vacate(self, dropped: Tensor) -> None:
        """Drop the entries in the slots where ``dropped``, bool ``[N, C]``."""
        self._overwrite(self.positions.masked_fill(dropped, VACANT))

    @writable
    def crop(self, seen: int) -> None:
        """Forget the entries of all tokens after the first ``seen``."""
        positions = self.positions
        self._overwrite(positions.masked_fill(positions >= seen, VACANT))

    def _overwrite(self, positions: Tensor) -> None:
        """Replace the positions of all slots, ``[N, C]``; what became vacant at the end of a row is free again."""
        occupied = positions != VACANT
        self.flat_positions = self.flattened(positions)
        used = (occupied * torch.arange(1, positions.shape[1] + 1, device=positions.device)).amax(-1)
        self._set_lengths(occupied.sum(-1), used)
        self._free = 0

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tensors with one index for the slots of all rows."""
        keys, values = self.keys, self.values
        return keys.view(-1, keys.shape[-1]), values.view(-1, values.shape[-1]), self.flat_positions

    def _slots(self, row: int) -> slice:
        """The slots of one row."""
        start = sum(self.capacities[:row])
        return slice(start, start + self.capacities[row])

    # What is held

    @property
    def positions(self) -> Tensor:
        """The position of each slot's token, int32 ``[N, C]``, -1 where vacant."""
        return self.by_row(self.flat_positions, VACANT)

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions ``[n]``, ascending, keys and values ``[n, D]`` of one row."""
        slots = self._slots(row)
        keys, values, positions = (each[slots] for each in self.flat())
        order = positions.argsort()[int((positions == VACANT).sum()) :]
        return positions[order], keys[order], values[order]

    def by_head(self, counts: Sequence[int]) -> list[list[int]]:
        """A number of each row, by sequence and KV head."""
        return [list(counts[start : start + self.heads]) for start in range(0, len(counts), self.heads)]

    def rows_of(self, sequence: int) -> slice:
        """The rows of a sequence."""
        return slice(sequence * self.heads, (sequence + 1) * self.heads)

    def slots_of(self, sequence: int) -> slice:
        """The slots of a sequence."""
        rows = self.rows_of(sequence)
        return slice(self._slots(rows.start).start, self._slots(rows.stop - 1).stop)

    def row_index(self, sequences: Tensor) -> Tensor:
        """The rows of several sequences, int64 ``[n * H_kv]``."""
        return (sequences[:, None] * self.heads + torch.arange(self.heads, device=sequences.device)).flatten()

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all sequences."""
        size = self.keys.shape[-1] + self.values.shape[-1]
        return len(self.held) * size * self.keys.element_size()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The storage, which a decode step reads and writes."""
        return self.keys, self.values, self.flat_positions, self.starts

    @property
    def nbytes(self) -> int:
        """Bytes that keys, values and positions occupy."""
        return sum(each.untyped_storage().nbytes() for each in (self.keys, self.values, self.flat_positions))

    def _by_kernel(self, query: Tensor) -> bool:
        """Whether the decode kernel takes these queries."""
        return query.shape[2] == 1 and kernels.usable(query, self.keys, self.values)

    def _kernel_arguments(self, query: Tensor, scaling: float | None) -> tuple[Any, ...]:
        longest = max(self.capacities)
        return query, self.keys, self.values, self.flat_positions, self.starts, self.used, longest, scaling
