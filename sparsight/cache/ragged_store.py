"""The KV store of a layer whose KV heads hold different numbers of entries."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from sparsight.attention import decode, kernels
from sparsight.cache.dense_store import DenseStore, vacant_slots
from sparsight.cache.kv_store import KVStore, growth_step
from sparsight.cache.step_metadata import writable
from sparsight.compression.eviction import VACANT


class RaggedStore(KVStore):
    """Rows one after the other in one storage ``[slots, D]``, each with as many slots as it needs."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        flat_positions: Tensor,
        heads: int,
        capacities: list[int],
        held: Tensor,
        used: Tensor,
    ) -> None:
        super().__init__(heads, held, used)
        self._lay_out(keys, values, flat_positions, capacities)

    @classmethod
    @writable
    def allocate(cls, held: Sequence[int], like_keys: Tensor, like_values: Tensor) -> "RaggedStore":
        """:meth:`KVStore.allocate`."""
        room = growth_step(sum(held) // len(held))
        capacities = [count + room for count in held]
        keys = like_keys.new_zeros(sum(capacities), like_keys.shape[-1])
        values = like_values.new_zeros(sum(capacities), like_values.shape[-1])
        positions = vacant_slots(sum(capacities), keys.device)
        lengths = torch.tensor(held, device=keys.device)
        return cls(keys, values, positions, like_keys.shape[1], capacities, lengths, lengths.clone())

    def fill(self, first_row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Put entries ``[H, n, D]`` at positions ``[H, n]`` in the first slots of ``H`` rows from ``first_row`` on."""
        for row, states in enumerate(zip(keys, values, positions.int(), strict=True), first_row):
            start = self._row_starts[row]
            for own, new in zip(self.flat(), states, strict=True):
                own[start : start + len(new)] = new

    def _lay_out(self, keys: Tensor, values: Tensor, flat_positions: Tensor, capacities: list[int]) -> None:
        self.keys, self.values, self.flat_positions = keys, values, flat_positions
        self._capacities = capacities
        self._row_starts = list(accumulate(capacities[:-1], initial=0))
        self.starts = torch.tensor(self._row_starts, device=keys.device)

    @property
    def capacities(self) -> list[int]:
        """:attr:`KVStore.capacities`."""
        return self._capacities

    def by_row(self, flat: Tensor, vacant: float) -> Tensor:
        """:meth:`KVStore.by_row`."""
        return pad_sequence(flat.split(self._capacities), batch_first=True, padding_value=vacant)

    def flattened(self, by_row: Tensor) -> Tensor:
        """:meth:`KVStore.flattened`."""
        return torch.cat([row[:capacity] for row, capacity in zip(by_row, self._capacities, strict=True)])

    def resize(self, extra: Sequence[int]) -> None:
        """:meth:`KVStore.resize`."""
        keys, values = self._padded(self.keys, extra), self._padded(self.values, extra)
        positions = self._padded(self.flat_positions, extra, VACANT)
        capacities = [capacity + more for capacity, more in zip(self._capacities, extra, strict=True)]
        self._lay_out(keys, values, positions, capacities)

    def _padded(self, states: Tensor, extra: Sequence[int], value: int = 0) -> Tensor:
        """``states`` ``[slots, ...]`` with ``extra[n]`` slots of ``value`` behind each row."""
        rows = zip(states.split(self._capacities), extra, strict=True)
        return torch.cat(
            [functional.pad(row, (0, 0) * (states.ndim - 1) + (0, more), value=value) for row, more in rows]
        )

    @writable
    def select(self, sequences: Tensor) -> None:
        """:meth:`KVStore.select`."""
        index = self.row_index(sequences)
        rows = index.tolist()
        keys, values, positions = (
            torch.cat([each.split(self._capacities)[row] for row in rows])
            for each in (self.keys, self.values, self.flat_positions)
        )
        index = index.to(self.held.device)
        self._set_lengths(self.held[index], self.used[index])
        self._lay_out(keys, values, positions, [self._capacities[row] for row in rows])

    def attend(self, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """:meth:`KVStore.attend`, row by row where no kernel takes all of them."""
        if self._by_kernel(query):
            return kernels.attend(*self._kernel_arguments(query, scaling))
        if self.static:
            return self._dense().attend(query, recent_mask, scaling)
        rows = self._each(query, recent_mask)
        return torch.cat([decode.attend(*row, scaling) for row in rows]).reshape(*query.shape[:-1], -1)

    def attend_and_score(
        self, query: Tensor, recent_mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`KVStore.attend_and_score`."""
        if self._by_kernel(query):
            return kernels.attend_and_score(*self._kernel_arguments(query, scaling))
        if self.static:
            return self._dense().attend_and_score(query, recent_mask, scaling)
        rows = [decode.attend_and_score(*row, scaling) for row in self._each(query, recent_mask)]
        received = pad_sequence([received.flatten() for _, received in rows], batch_first=True)
        received = functional.pad(received, (0, max(self._capacities) - received.shape[1]))
        return torch.cat([output for output, _ in rows]).reshape(*query.shape[:-1], -1), received

    def _dense(self) -> DenseStore:
        """A copy with equally many slots a row: one attention for all rows, as a compiled step should have."""
        keys, values = (
            pad_sequence(each.split(self._capacities), batch_first=True).unflatten(0, (-1, self.heads))
            for each in (self.keys, self.values)
        )
        dense = DenseStore(keys, values, self.positions.flatten(), self.held, self.used)
        dense.static = True
        return dense

    def _each(
        self, query: Tensor, recent_mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """For every row its queries ``[1, G, q, D]``, keys, values, occupied slots and the mask of its sequence."""
        group = query.shape[1] // self.heads
        for row, (used, held) in enumerate(zip(self.used.tolist(), self.held.tolist(), strict=True)):
            slots = slice(self._row_starts[row], self._row_starts[row] + used)
            sequence, head = divmod(row, self.heads)
            occupied = None if held == used else (self.flat_positions[slots] != VACANT)[None, None]
            mask = recent_mask
            if mask is not None:
                mask = mask.expand(query.shape[0], -1, -1, -1)[sequence, None]
            queries = query[sequence, None, head * group : (head + 1) * group]
            yield queries, self.keys[None, None, slots], self.values[None, None, slots], occupied, mask
