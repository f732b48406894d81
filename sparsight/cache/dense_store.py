"""The KV store of a layer whose rows have equally many slots."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.attention import decode, kernels
from sparsight.cache.kv_store import KVStore, growth_step
from sparsight.cache.step_metadata import writable
from sparsight.compression.eviction import VACANT


class DenseStore(KVStore):
    """Keys and values as ``[B, H_kv, C, D]``: one attention for all rows. Shorter sequences have vacant slots."""

    def __init__(self, keys: Tensor, values: Tensor, flat_positions: Tensor, held: Tensor, used: Tensor) -> None:
        super().__init__(keys.shape[1], held, used)
        self._lay_out(keys, values, flat_positions)

    @classmethod
    @writable
    def allocate(cls, held: Sequence[int], like_keys: Tensor, like_values: Tensor) -> "DenseStore":
        """:meth:`KVStore.allocate`."""
        heads = like_keys.shape[1]
        shape = len(held) // heads, heads, max(held) + growth_step(max(held))
        # Zeros, because attention multiplies the values of vacant slots by a weight of zero.
        keys = like_keys.new_zeros(*shape, like_keys.shape[-1])
        values = like_values.new_zeros(*shape, like_values.shape[-1])
        lengths = torch.tensor(held, device=keys.device)
        return cls(keys, values, vacant_slots(math.prod(shape), keys.device), lengths, lengths.clone())

    def fill(self, first_row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Put entries ``[H, n, D]`` at positions ``[H, n]`` in the first slots of ``H`` rows from ``first_row`` on."""
        rows, slots = slice(first_row, first_row + len(keys)), slice(keys.shape[1])
        self.keys.flatten(0, 1)[rows, slots] = keys
        self.values.flatten(0, 1)[rows, slots] = values
        self.positions[rows, slots] = positions.int()

    def _lay_out(self, keys: Tensor, values: Tensor, flat_positions: Tensor) -> None:
        self.keys, self.values, self.flat_positions = keys, values, flat_positions
        batch, heads, capacity, _ = keys.shape
        self._capacities = [capacity] * (batch * heads)
        self.starts = torch.arange(0, batch * heads * capacity, capacity, device=keys.device)

    @property
    def capacities(self) -> list[int]:
        """:attr:`KVStore.capacities`, all the same."""
        return self._capacities

    def by_row(self, flat: Tensor, vacant: float) -> Tensor:
        """:meth:`KVStore.by_row`, a view."""
        return flat.view(-1, self.keys.shape[2])

    def flattened(self, by_row: Tensor) -> Tensor:
        """:meth:`KVStore.flattened`."""
        return by_row.flatten()

    def resize(self, extra: Sequence[int]) -> None:
        """:meth:`KVStore.resize`: all rows by as much as the one that needs most."""
        more = max(extra)
        keys, values = (functional.pad(each, (0, 0, 0, more)) for each in (self.keys, self.values))
        self._lay_out(keys, values, functional.pad(self.positions, (0, more), value=VACANT).flatten())

    @writable
    def select(self, sequences: Tensor) -> None:
        """:meth:`KVStore.select`."""
        sequences = sequences.to(self.keys.device)
        rows = self.row_index(sequences)
        self._set_lengths(self.held[rows], self.used[rows])
        positions = self.positions.index_select(0, rows).flatten()
        self._lay_out(self.keys.index_select(0, sequences), self.values.index_select(0, sequences), positions)

    def _end(self) -> Tensor:
        """New turns begin at the same slot in all rows, so that they are the last keys of one attention."""
        return self.used.amax().expand_as(self.used)

    def attend(self, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """:meth:`KVStore.attend`."""
        if self._by_kernel(query):
            return kernels.attend(*self._kernel_arguments(query, scaling))
        return decode.attend(query, *self._attended(query), recent_mask, scaling)

    def attend_and_score(
        self, query: Tensor, recent_mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`KVStore.attend_and_score`."""
        if self._by_kernel(query):
            return kernels.attend_and_score(*self._kernel_arguments(query, scaling))
        output, received = decode.attend_and_score(query, *self._attended(query), recent_mask, scaling)
        received = received.flatten(0, 1)
        return output, functional.pad(received, (0, self.keys.shape[2] - received.shape[1]))

    def _attended(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values to attend to, and which of their slots are occupied; None if all are."""
        used, vacancies = self.keys.shape[2], True
        # Reading lengths would wait for a GPU, and cannot be captured; a new turn is not, and its tokens come last.
        if (not self.static and self.keys.device.type == "cpu") or query.shape[2] > 1:
            used, least = self._lengths.extent(self._layer)
            vacancies = least < used
        occupied = (self.positions[:, :used] != VACANT).view(-1, self.heads, used) if vacancies else None
        return self.keys.narrow(2, 0, used), self.values.narrow(2, 0, used), occupied


def vacant_slots(count: int, device: torch.device) -> Tensor:
    """Positions of ``count`` vacant slots."""
    return torch.full((count,), VACANT, dtype=torch.int32, device=device)
