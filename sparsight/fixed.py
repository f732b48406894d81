"""New tokens taken in by one layer in tensors alone: nothing moves, and nothing is read on the host.

So a decode step can be recorded once, as a CUDA graph or by torch.compile, and replayed for every token.
"""

import math

import torch
from torch import Tensor

from sparsight import kernels
from sparsight.entries import writable
from sparsight.parts.decode import slot_of_lowest, slot_to_write
from sparsight.ragged import Held
from sparsight.ring import Allowance, HeavyHitters


class FixedEntries:
    """Entries with room for the tokens to come, whose addresses stay, and tensors of what changes with every token.

    A row is a sequence, or one KV head of a sequence where the heads hold different numbers of entries; ``Hr`` is the
    KV heads of a row. Rows know nothing of each other: :meth:`clear` empties those of one sequence, which hold their
    place until :meth:`fill` gives them another, and neither touches the neighbours.

    Attributes:
        entries, ring: whose storage this is, and what of it may go.
        position, end: int64 ``[R]``, the position of the next token, and the first for which there is no room.
        held, used: int64 ``[R]``, entries, and slots up to the last one in use.
        active: int64 ``[R]``, 1 for rows that hold a sequence, 0 for those that are empty.
    """

    @writable
    def __init__(self, entries: Held, ring: Allowance | None, position: int, room: int) -> None:
        entries.reserve(room if ring is None else math.ceil(max(ring.shares) * room) + 1)
        self.entries, self.ring = entries, ring
        device = entries.keys.device
        if ring is not None:
            if isinstance(ring, HeavyHitters):
                ring.protect(entries)
            # Only what prefill rounded up is dropped two at a time: from here on a token replaces one at most.
            ring.make_room(entries, position)
            numbers = [ring.shares, ring.padding, ring.turn_tokens, ring.protected]
            self._numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
            if isinstance(ring, HeavyHitters):
                ring.scores = ring.fitted(entries).clone()
            else:
                self._fixed_positions = entries.positions_at(ring.protected, position)
        self.held = torch.tensor(entries.held, device=device)
        self.used = torch.tensor(entries.ends, device=device)
        self.position = torch.full_like(self.held, position)
        self.end = self.position + room
        self.active = torch.ones_like(self.held)
        self._starts = entries.rows()[0].view(len(self.held), -1)
        self._capacity = entries.positions.shape[2]
        if device.type == "cuda":
            # Otherwise torch.compile would copy the entries for every token.
            counters = (self.held, self.used, self.position, self.end, self.active)
            scores = [ring.scores] if isinstance(ring, HeavyHitters) else []
            for tensor in (*entries.tensors, *counters, *scores):
                torch._dynamo.mark_static_address(tensor)

    def take_in(self, keys: Tensor, values: Tensor) -> None:
        """Take in one new token's entries, ``[B, H_kv, 1, D]``.

        Raises:
            RuntimeError: there is no more room.
        """
        fits = (self.position < self.end).all()
        torch._assert_async(fits, "There is no room for another token: give CompressedCache a larger max_new_tokens.")
        slots, grows = self._slots()
        slots = slots * self.active[:, None]
        places = (self._starts + slots).flatten()
        entries = self.entries
        for states, new in ((entries.keys, keys), (entries.values, values)):
            states.view(-1, states.shape[-1]).index_copy_(0, places, new.flatten(0, 2))
        positions = self.position.to(torch.int32)[:, None].expand_as(slots)
        entries.flat_positions.index_copy_(0, places, positions.flatten())
        self.held.add_(grows * self.active)
        if isinstance(self.ring, HeavyHitters):
            # What took the place of an entry does not inherit its score.
            self.ring.scores.masked_fill_(entries.positions == self.position[:, None, None], 0)
            self._numbers[3].copy_((self.ring.rule.recent * self.held.double()).round().clamp(min=1))
        self.used.copy_(torch.maximum(self.used, (slots.amax(-1) + 1) * self.active))
        self.position.add_(self.active)

    def _slots(self) -> tuple[Tensor, Tensor]:
        """Slot that each row's new entry takes, int64 ``[R, Hr]``, and bool ``[R]``, whether it is vacant."""
        if self.ring is None:
            return self.used[:, None].expand_as(self._starts), torch.ones_like(self.held, dtype=torch.bool)
        share, padding, turns, protected = self._numbers
        # As `drops` in sparsight/parts/decode.py has it, one entry at most.
        allowance = share * (self.position + 1 - padding - turns) + turns
        grows = (self.held + 1 <= allowance) | (self.held <= protected)
        positions = self.entries.positions
        if isinstance(self.ring, HeavyHitters):
            return slot_of_lowest(positions, self.ring.scores, protected.long(), grows), grows
        return slot_to_write(positions, self._fixed_positions, grows), grows

    def attend(self, query: Tensor, scaling: float | None) -> Tensor:
        """Attention ``[B, H, 1, D]`` of the token that was taken in over all entries held."""
        entries = self.entries
        if isinstance(self.ring, HeavyHitters):
            output, got = entries.whole().attend_and_tell(query, None, scaling)
            self.ring.scores.add_(got.view_as(self.ring.scores))
            return output
        if kernels.usable(query, entries.keys, entries.values):
            lengths = self.used.clamp(min=1)[:, None].expand_as(self._starts)
            rows = torch.stack([self._starts, lengths]).flatten(1)
            return kernels.attend(query, *entries.tensors, rows, self._capacity, scaling)
        return entries.whole().attend(query, None, scaling)

    def settle(self) -> int:
        """Tell the entries how many they are by now; how many tokens were seen."""
        held, used = torch.stack([self.held, self.used]).tolist()
        self.entries.settle(held, used)
        return int(self.position.max())

    # Sequences of a batch that come and go

    def clear(self, sequence: int) -> None:
        """Empty the rows of a sequence: they hold their place, and one entry that nobody sees."""
        rows = self._rows_of(sequence)
        self.entries.clear(sequence)
        for counter in (self.held, self.used, self.position, self.active):
            counter[rows] = 0
        self.end[rows] = 1

    def fill(self, sequence: int, other: "FixedEntries") -> None:
        """Give the rows of a sequence all of ``other``, one sequence compressed alone by the same recipe.

        Raises:
            ValueError: it has more slots than these rows.
        """
        self.entries.replace(sequence, other.entries)
        rows = self._rows_of(sequence)
        for name in ("held", "used", "position", "end", "active"):
            getattr(self, name)[rows] = getattr(other, name)
        if self.ring is None or other.ring is None:
            return
        self._numbers[:, rows] = other._numbers
        self.ring.replace(rows, other.ring)
        if not isinstance(self.ring, HeavyHitters):
            self._fixed_positions[rows] = other._fixed_positions

    def _rows_of(self, sequence: int) -> slice:
        rows = self.entries.rows_of(torch.tensor([sequence])).tolist()
        return slice(rows[0], rows[-1] + 1)
