"""Entries of a layer whose KV heads hold different numbers: each head's storage is as long as it needs to be."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from sparsight.attention import kernels
from sparsight.cache.dense_store import VACANT, DenseStore, growth_step, shifted, writable


class RaggedStore:
    """:class:`DenseStore` of rows of different lengths: every KV head of every sequence is a row of its own.

    Rows lie one after the other in one storage, each with its own room to grow. Tensors that go in and out are by
    sequence and head, ``[B, H_kv, ...]``, as for :class:`DenseStore`; whatever is kept by row has ``R = B * H_kv``.

    Attributes:
        keys, values: ``[slots, D]``.
        flat_positions: int32 ``[slots]``, the position of each slot's token, -1 where the slot is vacant.
        heads: KV heads.
        capacities, starts: slots of each row, and its first one.
        used: slots of each row that are in use, from its first on.
        held: entries of each row.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, heads: int, capacities: list[int]) -> None:
        self.keys, self.values, self.flat_positions = keys, values, positions
        self.heads = heads
        self._lay_out(capacities)
        self.used: list[int] = []
        self.held: list[int] = []

    @classmethod
    @writable
    def allocate(cls, held: list[int], like_keys: Tensor, like_values: Tensor) -> "RaggedStore":
        """Storage for ``held[r]`` entries of each row, vacant yet; dtype and shape follow ``[B, H_kv, T, D]``."""
        room = growth_step(sum(held) // len(held))
        capacities = [count + room for count in held]
        slots = sum(capacities)
        keys = like_keys.new_zeros(slots, like_keys.shape[-1])
        values = like_values.new_zeros(slots, like_values.shape[-1])
        positions = torch.full((slots,), VACANT, dtype=torch.int32, device=keys.device)
        entries = cls(keys, values, positions, like_keys.shape[1], capacities)
        entries.used, entries.held = list(held), list(held)
        return entries

    def fill(self, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Put the ``held[row]`` entries that a row keeps, ``[1, n, D]`` at ``[1, n]``, in its slots."""
        slots = slice(self.starts[row], self.starts[row] + self.held[row])
        self.keys[slots], self.values[slots] = keys[0], values[0]
        self.flat_positions[slots] = positions[0].to(torch.int32)

    @classmethod
    @writable
    def join(cls, parts: Sequence["RaggedStore"], padding: Sequence[int]) -> "RaggedStore":
        """The rows of several, one after the other, those of ``parts[i]`` at positions ``padding[i]`` later."""
        positions = [shifted(part.flat_positions, later) for part, later in zip(parts, padding, strict=True)]
        joined = cls(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat(positions),
            parts[0].heads,
            [capacity for part in parts for capacity in part.capacities],
        )
        joined.used = [used for part in parts for used in part.used]
        joined.held = [held for part in parts for held in part.held]
        return joined

    def append(self, keys: Tensor, values: Tensor, position: int, valid: Tensor | None = None) -> None:
        """Append entries ``[B, H_kv, q, D]`` at consecutive positions; bool ``valid`` ``[B, q]`` excepts padding."""
        count = keys.shape[2]
        self.reserve(count)
        new = torch.arange(count, device=keys.device)
        positions = (new + position).to(torch.int32).expand(len(self.held), -1)
        added = [count] * len(self.held)
        if valid is not None:
            valid = valid.repeat_interleave(self.heads, 0)
            positions = positions.masked_fill(~valid, VACANT)
            added = valid.sum(-1).tolist()
        slots = self._slots(torch.tensor(self.used, device=keys.device)[:, None] + new).flatten()
        self.keys[slots], self.values[slots] = keys.flatten(0, 2), values.flatten(0, 2)
        self.flat_positions[slots] = positions.flatten()
        self.held = [held + more for held, more in zip(self.held, added, strict=True)]
        self.used = [used + count for used in self.used]

    def put(self, keys: Tensor, values: Tensor, position: int, slots: Sequence[int], grown: Sequence[bool]) -> None:
        """:meth:`overwrite` of slots that are known on the host."""
        self.overwrite(keys, values, position, torch.tensor(slots, device=keys.device)[:, None], grown)

    def overwrite(self, keys: Tensor, values: Tensor, position: int, slots: Tensor, grown: Sequence[bool]) -> None:
        """Write one entry a row, ``[B, H_kv, 1, D]``, to its slot ``[R, 1]``; it was vacant where ``grown``."""
        self.held = [held + new for held, new in zip(self.held, grown, strict=True)]
        places = self._slots(slots).flatten()
        self.keys[places], self.values[places] = keys.flatten(0, 2), values.flatten(0, 2)
        self.flat_positions[places] = position
        self.used = [max(used, held) for used, held in zip(self.used, self.held, strict=True)]

    def vacate(self, slots: Tensor, dropped: Sequence[bool]) -> None:
        """Drop the entry in the slot ``[R, 1]`` of every row where ``dropped``."""
        self.held = [held - gone for held, gone in zip(self.held, dropped, strict=True)]
        places = self._slots(slots).flatten()
        self.flat_positions[places[torch.tensor(dropped, device=places.device)]] = VACANT

    @writable
    def reserve(self, count: int) -> None:
        """Grow every row's storage, in steps, until ``count`` more entries fit."""
        missing = [used + count - capacity for used, capacity in zip(self.used, self.capacities, strict=True)]
        if max(missing) <= 0:
            return
        # Rows grow by the same number of slots: where all take every new entry, all are full at the same time.
        step = growth_step(sum(self.used) // len(self.used))
        extra = [max(slots, step) if slots > 0 else 0 for slots in missing]
        self.keys = self._padded(self.keys, extra)
        self.values = self._padded(self.values, extra)
        self.flat_positions = self._padded(self.flat_positions, extra, VACANT)
        self._lay_out([capacity + more for capacity, more in zip(self.capacities, extra, strict=True)])

    def drop_newest(self, count: int) -> None:
        """Forget the ``count`` entries appended last."""
        newest = torch.tensor(self.used)[:, None] - torch.arange(1, count + 1)
        places = self._slots(newest.to(self.keys.device))
        dropped = (self.flat_positions[places] != VACANT).sum(-1).tolist()
        self.flat_positions[places.flatten()] = VACANT
        self.held = [held - lost for held, lost in zip(self.held, dropped, strict=True)]
        self.used = [used - count for used in self.used]

    @writable
    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by those at ``index``, a tensor on the CPU (see :meth:`rows_of`)."""
        rows = index.tolist()
        self.keys = torch.cat([self.keys.split(self.capacities)[row] for row in rows])
        self.values = torch.cat([self.values.split(self.capacities)[row] for row in rows])
        self.flat_positions = torch.cat([self.flat_positions.split(self.capacities)[row] for row in rows])
        self._lay_out([self.capacities[row] for row in rows])
        self.used, self.held = [self.used[row] for row in rows], [self.held[row] for row in rows]

    def positions_at(self, indices: Sequence[int], next_position: int) -> Tensor:
        """:meth:`DenseStore.positions_at` of every row, int32 ``[R, 1]``."""
        return torch.cat([self._row(row).positions_at([index], next_position) for row, index in enumerate(indices)])

    def attend(self, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """:meth:`DenseStore.attend`, row by row where no kernel takes all of them."""
        if query.shape[2] == 1 and kernels.usable(query, self.keys, self.values):
            return kernels.attend(query, *self.tensors, self.rows(), max(self.used), scaling)
        rows = [self._row(row).attend(*self._asked(row, query, recent_mask), scaling) for row in range(len(self.held))]
        return torch.cat(rows).reshape(*query.shape[:-1], -1)

    def attend_and_tell(
        self, query: Tensor, recent_mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`DenseStore.attend_and_tell`, the attention that each slot got as ``[R, 1, largest capacity]``."""
        rows = [
            self._row(row).attend_and_tell(*self._asked(row, query, recent_mask), scaling)
            for row in range(len(self.held))
        ]
        got = pad_sequence([told.flatten() for _, told in rows], batch_first=True)
        got = functional.pad(got, (0, max(self.capacities) - got.shape[1]))
        return torch.cat([output for output, _ in rows]).reshape(*query.shape[:-1], -1), got[:, None]

    @property
    def ends(self) -> list[int]:
        """Slots of each row up to the last one in use."""
        return self.used

    def settle(self, held: list[int], ends: list[int]) -> None:
        """:meth:`DenseStore.settle`."""
        self.held, self.used = held, ends

    def rows(self) -> Tensor:
        """First slot of each row, and how many are in use, ``[2, R]``."""
        return torch.tensor([self.starts, self.used], device=self.keys.device)

    def whole(self) -> DenseStore:
        """The same entries, by sequence and KV head, with vacant slots behind the shorter rows."""
        by_row = [pad_sequence(each.split(self.capacities), batch_first=True) for each in (self.keys, self.values)]
        keys, values = (each.unflatten(0, (-1, self.heads)) for each in by_row)
        positions = self.positions.view(keys.shape[:3])
        return DenseStore(keys, values, positions, [0] * len(positions)).whole()

    def replace(self, sequence: int, other: Any) -> None:
        """:meth:`DenseStore.replace`; every row must fit."""
        rows = slice(sequence * self.heads, (sequence + 1) * self.heads)
        more, own = other.capacities, self.capacities[rows]
        if any(slots > room for slots, room in zip(more, own, strict=True)):
            raise ValueError(f"A sequence with {more} slots does not fit in the place of one with {own}.")
        self.clear(sequence)
        for start, own_start, slots in zip(other.starts, self.starts[rows], more, strict=True):
            theirs, ours = slice(start, start + slots), slice(own_start, own_start + slots)
            self.keys[ours], self.values[ours] = other.keys[theirs], other.values[theirs]
            self.flat_positions[ours] = other.flat_positions[theirs]

    def clear(self, sequence: int) -> None:
        """:meth:`DenseStore.clear`."""
        for row in range(sequence * self.heads, (sequence + 1) * self.heads):
            self.flat_positions[self.starts[row] : self.starts[row] + self.capacities[row]] = VACANT

    def rows_of(self, index: Tensor) -> Tensor:
        """The rows of the sequences at ``index``."""
        return (index[:, None] * self.heads + torch.arange(self.heads)).flatten()

    def by_head(self, counts: Sequence[int]) -> list[list[int]]:
        """A number of each row, by sequence and KV head."""
        return [list(counts[start : start + self.heads]) for start in range(0, len(counts), self.heads)]

    @property
    def positions(self) -> Tensor:
        """The position of each slot's token, int32 ``[R, 1, largest capacity]``, -1 where vacant or past the end."""
        rows = self.flat_positions.split(self.capacities)
        return pad_sequence(rows, batch_first=True, padding_value=VACANT)[:, None]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all rows."""
        return len(self.held) * (self.keys[0].nbytes + self.values[0].nbytes)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where everything lies."""
        return self.keys, self.values, self.flat_positions

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def _lay_out(self, capacities: list[int]) -> None:
        """Note how many slots each row has."""
        self.capacities = capacities
        self.starts = list(accumulate(capacities[:-1], initial=0))

    def _slots(self, places: Tensor) -> Tensor:
        """Slots of the storage for ``places`` ``[R, n]`` that count from the first of each row."""
        return places + torch.tensor(self.starts, device=places.device)[:, None]

    def _padded(self, states: Tensor, extra: list[int], value: int = 0) -> Tensor:
        """``states`` ``[slots, ...]`` with ``extra[r]`` slots of ``value`` behind each row."""
        rows = zip(states.split(self.capacities), extra, strict=True)
        return torch.cat(
            [functional.pad(row, (0, 0) * (states.ndim - 1) + (0, more), value=value) for row, more in rows]
        )

    def _row(self, row: int) -> DenseStore:
        """One row in the same storage."""
        slots = slice(self.starts[row], self.starts[row] + self.used[row])
        keys, values, positions = self.keys[slots], self.values[slots], self.flat_positions[slots]
        entries = DenseStore(keys[None, None], values[None, None], positions[None, None], [self.held[row]])
        entries.used = self.used[row]
        return entries

    def _asked(self, row: int, query: Tensor, recent_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What one row is asked: its queries ``[1, G, q, D]`` and the mask of its sequence."""
        sequence, head = divmod(row, self.heads)
        group = query.shape[1] // self.heads
        mask = recent_mask if recent_mask is None else recent_mask.expand(query.shape[0], -1, -1, -1)[sequence, None]
        return query[sequence, None, head * group : (head + 1) * group], mask


KVStore = DenseStore | RaggedStore
"""What a layer holds after compression."""
