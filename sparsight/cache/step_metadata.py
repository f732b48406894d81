"""The newest token of every sequence: its position, and the slot that it takes in every row of every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsight.compression.eviction import EvictionRule, EvictionState, fitted

if TYPE_CHECKING:
    from sparsight.cache.kv_store import KVStore

UNBOUNDED = 2**62

# Tensors made in inference mode could not be written to outside of it.
writable = torch.inference_mode(False)


@dataclass
class Lengths:
    """How long the rows of some layers are.

    Attributes:
        held: int64 ``[L, N]``, entries of each row.
        used: int64 ``[L, N]``, slots of each row up to the last occupied one.
    """

    held: Tensor
    used: Tensor
    _extents: list[tuple[int, int]] | None = None

    def extent(self, layer: int) -> tuple[int, int]:
        """Slots used of a layer's longest row, and entries of its shortest, on the host."""
        if self._extents is None:
            self._extents = list(zip(self.used.amax(-1).tolist(), self.held.amin(-1).tolist(), strict=True))
        return self._extents[layer]

    def grow(self, grows: Tensor, slots: Tensor) -> None:
        """Count an entry more in each row that ``grows``, bool ``[L, N]``, and new ones in ``slots``, ``[L, N]``."""
        self.held.add_(grows)
        torch.maximum(self.used, slots + 1, out=self.used)
        self._extents = None


class StepMetadata:
    """What a decode step needs to know, for all layers of a device at once: :meth:`advance` makes it.

    It consists of tensors that a captured decode step updates in place.

    Attributes:
        position: int64 ``[B]``, the position of the newest token of each sequence.
        end: int64 ``[B]``, the first position that does not fit.
        row_positions: int32 ``[N]``, ``position`` of each KV head of each sequence.
        slots: for each layer int64 ``[N]``, the slot of its row that the newest token takes.
        places: for each layer int64 ``[N]``, that slot in the layer's storage.
    """

    slots: Sequence[Tensor]
    places: Sequence[Tensor]

    @writable
    def __init__(
        self, rule: EvictionRule, batch: int, heads: int, seen: int, room: int | None, device: torch.device
    ) -> None:
        self.rule = rule
        self.position = torch.full((batch,), seen - 1, device=device)
        self.end = self.position + (UNBOUNDED if room is None else room + 1)
        self.row_positions = torch.zeros(batch * heads, dtype=torch.int32, device=device)
        self._row_seen = torch.zeros(batch * heads, dtype=torch.float64, device=device)
        self._layers: list[tuple[KVStore, EvictionState]] = []
        self._gathered: tuple[Lengths, Tensor, EvictionState] | None = None

    def add_layer(self, store: "KVStore", state: EvictionState) -> int:
        """Take in the rows of another layer; its index."""
        self._layers.append((store, state))
        self._gathered = None
        return len(self._layers) - 1

    @writable
    def gather(self) -> tuple[Lengths, Tensor, EvictionState]:
        """Lengths, starts and eviction state of all layers' rows, ``[L, N]``; the stores share these lengths then."""
        stores, states = zip(*self._layers, strict=True)
        lengths = Lengths(torch.stack([each.held for each in stores]), torch.stack([each.used for each in stores]))
        for index, store in enumerate(stores):
            store.share(lengths, index)
        self._gathered = (
            lengths,
            torch.stack([each.starts for each in stores]),
            EvictionState.combine(states, torch.stack),
        )
        return self._gathered

    def make_room(self, layer: int, seen: int, tokens: int) -> None:
        """Have slots of a layer for ``tokens`` more, before the token at position ``seen``."""
        store, state = self._layers[layer]
        if state.rounded:
            store.vacate(self.rule.excess(store, state, seen))
            state.rounded, self._gathered = False, None
        if store.reserve(tokens):
            state.scores, self._gathered = fitted(state.scores, max(store.capacities)), None

    def make_room_everywhere(self, seen: int) -> None:
        """Have a slot in every layer for the token at position ``seen``."""
        for layer in range(len(self._layers)):
            self.make_room(layer, seen, 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What changes with every token, and what it depends on."""
        lengths, starts, state = self._gathered or self.gather()
        own = self.position, self.end, self.row_positions, self._row_seen
        return *own, lengths.held, lengths.used, starts, *state.tensors

    @property
    def seen(self) -> Tensor:
        """Tokens seen, of the sequence that has seen most."""
        return self.position.amax() + 1

    def advance(self) -> None:
        """Go on by one token.

        Raises:
            RuntimeError: it does not fit.
        """
        self.position.add_(1)
        fits = (self.position < self.end).all()
        torch._assert_async(fits, "There is no room for another token: give CompressedCache a larger max_new_tokens.")
        self.row_positions.view(len(self.position), -1).copy_(self.position[:, None])
        torch.add(self.row_positions, 1, out=self._row_seen)
        lengths, starts, state = self._gathered or self.gather()
        grows = self.rule.grows(lengths.held, state, self._row_seen)
        slots = torch.stack(
            [self.rule.slots(*layer, more) for layer, more in zip(self._layers, grows.unbind(), strict=True)]
        )
        lengths.grow(grows, slots)
        self.slots, self.places = slots.unbind(), (starts + slots).unbind()
