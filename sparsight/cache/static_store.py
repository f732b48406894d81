"""New tokens taken in by the layers in tensors alone: nothing moves, and nothing is read on the host.

So a decode step can be recorded once, as a CUDA graph or by torch.compile, and replayed for every token.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.attention import kernels
from sparsight.cache.dense_store import writable
from sparsight.cache.eviction_state import Allowance, HeavyHitters
from sparsight.cache.ragged_store import KVStore
from sparsight.compression.eviction import slot_of_lowest, slot_to_write


class StepMetadata:
    """Where the sequences of a batch are, for all layers.

    Attributes:
        position, end: int64 ``[B]``, the position of the newest token, and the first for which there is no room.
        active: int64 ``[B]``, 1 where there is a sequence, 0 where there is only the place of one.
        positions, steps: ``position``, as int32, and ``active`` of each KV head of each sequence, ``[B * H_kv]``.
    """

    @writable
    def __init__(self, batch: int, heads: int, seen: int, room: int, device: torch.device) -> None:
        self.position = torch.full((batch,), seen - 1, device=device)
        self.end = self.position + room + 1
        self.active = torch.ones_like(self.position)
        self.positions = torch.zeros(batch * heads, dtype=torch.int32, device=device)
        self.steps = torch.ones(batch * heads, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What changes with every token."""
        return self.position, self.end, self.active, self.positions, self.steps

    def tick(self) -> None:
        """Go on by one token.

        Raises:
            RuntimeError: there is no more room.
        """
        self.position.add_(self.active)
        fits = (self.position < self.end).all()
        torch._assert_async(fits, "There is no room for another token: give CompressedCache a larger max_new_tokens.")
        self.positions.view(len(self.position), -1).copy_(self.position[:, None])

    def put(self, sequence: int, position: Tensor | int, end: Tensor | int, active: int) -> None:
        """Set where one sequence is."""
        self.position[sequence], self.end[sequence], self.active[sequence] = position, end, active
        self.steps.view(len(self.active), -1)[sequence] = active


class StaticStore:
    """Entries with room for the tokens to come, whose addresses stay, and tensors of what changes with every token.

    A row is a sequence, or one KV head of a sequence where the heads hold different numbers of entries; ``Hr`` is the
    KV heads of a row. Sequences know nothing of each other: :meth:`clear` empties the place of one until :meth:`fill`
    gives it another, and neither touches the neighbours.

    Attributes:
        entries, ring: whose storage this is, and what of it may go.
        clock: where the sequences are, the same for all layers; the first of them makes it tick.
        held: int64 ``[R]``, entries of each row.
        rows: int64 ``[2, B * H_kv]``, the first slot of each KV head, and its slots up to the last one in use.
    """

    @writable
    def __init__(
        self, entries: KVStore, ring: Allowance | None, seen: int, room: int, first: "StaticStore | None"
    ) -> None:
        entries.reserve(_growth(entries, ring, seen + room, room))
        self.entries, self.ring = entries, ring
        device = entries.keys.device
        if ring is not None:
            if isinstance(ring, HeavyHitters):
                ring.protect(entries)
            # Only what prefill rounded up is dropped two at a time: from here on a token replaces one at most.
            ring.make_room(entries, seen)
            by_row = [ring.shares, ring.padding, ring.turn_tokens, ring.protected]
            self._numbers = torch.tensor(by_row, dtype=torch.float64, device=device)
            if isinstance(ring, HeavyHitters):
                ring.scores = ring.fitted(entries).clone()
            else:
                self._fixed_positions = entries.positions_at(ring.protected, seen)
        self.held = torch.tensor(entries.held, device=device)
        self.rows = entries.rows()
        # A layer on another device has a clock of its own.
        first = None if first is None or first.held.device != device else first
        self.leads = first is None
        self.clock: StepMetadata = (
            StepMetadata(self.rows.shape[1] // entries.heads, entries.heads, seen, room, device)
            if first is None
            else first.clock
        )
        self._capacity = entries.positions.shape[2]
        if device.type == "cuda":
            # Otherwise torch.compile would copy the entries for every token.
            scores = [ring.scores] if isinstance(ring, HeavyHitters) else []
            numbers = [] if ring is None else [self._numbers]
            for tensor in (*entries.tensors, self.held, self.rows, *self.clock.tensors, *scores, *numbers):
                torch._dynamo.mark_static_address(tensor)

    def take_in(self, keys: Tensor, values: Tensor) -> None:
        """Take in one new token's entries, ``[B, H_kv, 1, D]``."""
        clock, entries = self.clock, self.entries
        if self.leads:
            clock.tick()
        starts, used = self.rows
        if self.ring is None:
            slots, grown = used, clock.steps.view(len(self.held), -1)[:, 0]
            used = used + clock.steps
        else:
            chosen, grows = self._slots(self.ring)
            slots, grown = chosen.flatten() * clock.steps, grows * clock.steps.view(chosen.shape)[:, 0]
            used = torch.maximum(used, slots + clock.steps)
        places = starts + slots
        for states, new in ((entries.keys, keys), (entries.values, values)):
            states.view(-1, states.shape[-1]).index_copy_(0, places, new.flatten(0, 2))
        entries.flat_positions.index_copy_(0, places, clock.positions)
        self.rows[1].copy_(used)
        self.held.add_(grown)
        if isinstance(self.ring, HeavyHitters):
            # What took the place of an entry does not inherit its score.
            newest = clock.positions.view(*self.ring.scores.shape[:2], 1)
            self.ring.scores.masked_fill_(entries.positions == newest, 0)
            self._numbers[3].copy_((self.ring.rule.recent * self.held.double()).round().clamp(min=1))

    def _slots(self, ring: Allowance) -> tuple[Tensor, Tensor]:
        """Slot that each row's new entry takes, int64 ``[R, Hr]``, and bool ``[R]``, whether it is vacant."""
        positions = self.entries.positions
        share, padding, turns, protected = self._numbers
        # As `drops` in sparsight/compression/eviction.py has it, one entry at most.
        newest = self.clock.positions.view(positions.shape[:2])[:, 0]
        allowance = share * (newest + 1 - padding - turns) + turns
        grows = (self.held + 1 <= allowance) | (self.held <= protected)
        if isinstance(ring, HeavyHitters):
            return slot_of_lowest(positions, ring.scores, protected.long(), grows), grows
        return slot_to_write(positions, self._fixed_positions, grows), grows

    def attend(self, query: Tensor, scaling: float | None) -> Tensor:
        """Attention ``[B, H, 1, D]`` of the token that was taken in over all entries held."""
        entries = self.entries
        if isinstance(self.ring, HeavyHitters):
            output, got = entries.whole().attend_and_tell(query, None, scaling)
            self.ring.scores.add_(got.detach().view_as(self.ring.scores))
            return output
        if kernels.usable(query, entries.keys, entries.values):
            return kernels.attend(query, *entries.tensors, self.rows, self._capacity, scaling)
        return entries.whole().attend(query, None, scaling)

    def settle(self) -> int:
        """Tell the entries how many they are by now; how many tokens were seen."""
        self.entries.settle(self.held.tolist(), self.rows[1].view(len(self.held), -1)[:, 0].tolist())
        return int(self.seen)

    @property
    def seen(self) -> Tensor:
        """Tokens seen, of the sequence that has seen most."""
        return self.clock.position.amax() + 1

    # Sequences of a batch that come and go

    def clear(self, sequence: int) -> None:
        """Leave of a sequence only its place, with one entry that nobody sees."""
        self.entries.clear(sequence)
        self.held[self._of(sequence)] = 0
        self._used(sequence).zero_()
        self.clock.put(sequence, 0, 1, active=0)

    def fill(self, sequence: int, other: "StaticStore") -> None:
        """Give the place of a sequence to that of ``other``, which was compressed alone by the same recipe.

        Raises:
            ValueError: it has more slots than there are in this place.
        """
        self.entries.replace(sequence, other.entries)
        rows = self._of(sequence)
        self.held[rows] = other.held
        self._used(sequence).copy_(other.rows[1])
        self.clock.put(sequence, other.clock.position[0], other.clock.end[0], active=1)
        if self.ring is None or other.ring is None:
            return
        self._numbers[:, rows] = other._numbers
        self.ring.replace(rows, other.ring)
        if not isinstance(self.ring, HeavyHitters):
            self._fixed_positions[rows] = other._fixed_positions

    def _of(self, sequence: int) -> slice:
        """The rows of a sequence."""
        rows: Sequence[int] = self.entries.rows_of(torch.tensor([sequence])).tolist()
        return slice(rows[0], rows[-1] + 1)

    def _used(self, sequence: int) -> Tensor:
        """Slots in use of each KV head of a sequence."""
        return self.rows[1].view(len(self.clock.position), -1)[sequence]


def _growth(entries: KVStore, ring: Allowance | None, tokens: int, room: int) -> int:
    """Slots that each row may come to need for ``room`` tokens, of which there are ``tokens`` then."""
    if ring is None or isinstance(ring, HeavyHitters):
        return room
    rows = zip(entries.held, ring.shares, ring.padding, ring.turn_tokens, ring.protected, strict=True)
    # Below its allowance a row grows, and up to one more entry than may not go.
    most = max(
        max(math.ceil(share * (tokens - padding - turns) + turns), protected + 1) - held
        for held, share, padding, turns, protected in rows
    )
    return min(max(most, 0), room) + 1
