"""Decoding within an allowance in one layer: which slot of the storage each new entry takes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.cache.dense_store import VACANT
from sparsight.cache.prefill import Prefill
from sparsight.cache.ragged_store import KVStore
from sparsight.compression import FixedPoint, HeavyHitter, Sliding
from sparsight.compression.eviction import drops, slot_of_lowest

NUMBERS = ("shares", "padding", "turn_tokens", "protected")
"""What an allowance has for each row."""


class Allowance(ABC):
    """How many entries each row of one layer may hold; what follows tells which ones go.

    A row is a sequence, or one KV head of a sequence where the heads hold different numbers of entries. A new turn of a
    conversation is added as it is and raises the allowance by its tokens.

    Attributes:
        shares: fraction of the tokens seen that may be held.
        padding: padding tokens among those seen.
        turn_tokens: tokens of new turns among those seen.
        protected: how many entries of each row may not go.
    """

    def __init__(
        self, rule: FixedPoint | Sliding | HeavyHitter, shares: Sequence[float], padding: Sequence[int]
    ) -> None:
        self.rule = rule
        self.shares, self.padding = list(shares), list(padding)
        self.turn_tokens = [0] * len(self.shares)
        self.protected: list[int] = []

    @classmethod
    def join(
        cls, rings: Sequence[Any], parts: Sequence[KVStore], padding: Sequence[int], entries: KVStore, seen: int
    ) -> Any:
        """The rows of several that have written nothing yet, for ``entries`` of ``seen`` tokens.

        The entries of ``rings[i]`` were ``parts[i]``, at positions ``padding[i]`` earlier.
        """
        shares = [share for ring in rings for share in ring.shares]
        joined = [own + more for ring, more in zip(rings, padding, strict=True) for own in ring.padding]
        return cls(rings[0].rule, shares, joined)

    def attend(self, entries: KVStore, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """:meth:`DenseStore.attend`."""
        return entries.attend(query, recent_mask, scaling)

    def add_turn(self, entries: KVStore, before: Sequence[int], count: int, seen: int) -> None:
        """Note that a turn of ``count`` tokens, padding included, was appended where ``before`` entries were held."""
        added = [held - old for held, old in zip(entries.held, before, strict=True)]
        self.turn_tokens = [tokens + new for tokens, new in zip(self.turn_tokens, added, strict=True)]
        self.padding = [tokens + count - new for tokens, new in zip(self.padding, added, strict=True)]
        self.protect(entries)

    def protect(self, entries: KVStore) -> None:
        """Let what is protected follow from the entries held now."""
        self.protected = [self.rule.fixed_index(held) for held in entries.held]

    def make_room(self, entries: KVStore, position: int) -> list[int]:
        """Drop entries until the token at ``position`` replaces no more than one of each row; how many it does."""
        entries.reserve(1)
        gone = [
            drops(held, share * (position + 1 - padding - turn) + turn, protected)
            for held, share, padding, turn, protected in zip(
                entries.held, self.shares, self.padding, self.turn_tokens, self.protected, strict=True
            )
        ]
        # More than one entry goes only where the number kept after prefill was rounded up.
        while max(gone) > 1:
            self.vacate(entries, [count > 1 for count in gone])
            gone = [count - (count > 1) for count in gone]
        return gone

    @abstractmethod
    def vacate(self, entries: KVStore, dropped: list[bool]) -> None:
        """Drop the next entry to go of every row where ``dropped``."""

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by those at ``index``, a tensor on the CPU."""
        rows = index.tolist()
        for name in NUMBERS:
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def replace(self, rows: slice, other: Any) -> None:
        """Replace some rows by all of ``other``."""
        for name in NUMBERS:
            getattr(self, name)[rows] = getattr(other, name)


class Ring(Allowance):
    """The entries from a fixed place on are a ring: a new one overwrites the oldest of them.

    A new turn moves the fixed place. Where addresses stay, nothing is written through this object, and the order is
    not kept.

    Attributes:
        order: slots of each row's entries in order of position, the same for all of its KV heads.
        vacant: slots of each row in front of the last one in use that hold nothing.
    """

    def start(self, entries: KVStore, prefill: Prefill, seen: int) -> None:
        """Begin with the entries kept of a prompt."""
        # They lie in order, behind the vacant slots.
        rows = list(zip(entries.held, entries.ends, strict=True))
        self.order = [list(range(end - held, end)) for held, end in rows]
        self.vacant = [list(range(end - held)) for held, end in rows]
        self.protect(entries)

    @classmethod
    def join(
        cls, rings: Sequence[Any], parts: Sequence[KVStore], padding: Sequence[int], entries: KVStore, seen: int
    ) -> "Ring":
        """:meth:`Allowance.join`."""
        joined: Ring = super().join(rings, parts, padding, entries, seen)
        joined.look_up(entries)
        return joined

    def add_turn(self, entries: KVStore, before: Sequence[int], count: int, seen: int) -> None:
        """:meth:`Allowance.add_turn`; the fixed place moves."""
        super().add_turn(entries, before, count, seen)
        self.look_up(entries)

    def look_up(self, entries: KVStore) -> None:
        """Find the order of the entries by their positions."""
        by_row = entries.positions[:, 0].argsort(-1).tolist()
        self.order = [row[len(row) - held :] for row, held in zip(by_row, entries.held, strict=True)]
        self.vacant = [sorted(set(range(max(order))).difference(order)) for order in self.order]
        self.protect(entries)

    def write(self, entries: KVStore, keys: Tensor, values: Tensor, position: int) -> None:
        """Take in one new token's entries, ``[B, H_kv, 1, D]``."""
        grow = [count == 0 for count in self.make_room(entries, position)]
        slots = []
        for order, vacant, place, grows in zip(self.order, self.vacant, self.protected, grow, strict=True):
            # Without a vacant slot all up to the number held are in use.
            slot = (vacant.pop() if vacant else len(order)) if grows else order.pop(place)
            order.append(slot)
            slots.append(slot)
        entries.put(keys, values, position, slots, grow)

    def vacate(self, entries: KVStore, dropped: list[bool]) -> None:
        """:meth:`Allowance.vacate`."""
        rows = list(zip(self.order, self.vacant, self.protected, dropped, strict=True))
        slots = [order[place] if gone else 0 for order, _, place, gone in rows]
        for order, vacant, place, gone in rows:
            if gone:
                vacant.append(order.pop(place))
        places = torch.tensor(slots, device=entries.keys.device)[:, None]
        entries.vacate(places.expand(entries.positions.shape[:2]), dropped)

    def select_rows(self, index: Tensor) -> None:
        """:meth:`Allowance.select_rows`."""
        super().select_rows(index)
        rows = index.tolist()
        self.order, self.vacant = ([list(slots[row]) for row in rows] for slots in (self.order, self.vacant))


class HeavyHitters(Allowance):
    """A new entry overwrites the one that has been attended to least, but for the most recent.

    Attributes:
        scores: float32 ``[R, 1 or H_kv, capacity]``, the attention that each slot's entry got so far.
    """

    rule: HeavyHitter

    def start(self, entries: KVStore, prefill: Prefill, seen: int) -> None:
        """Begin with the entries kept of a prompt, and the scores that they had in it."""
        self.protect(entries)
        spans = prefill.prompt.spans
        positions = entries.positions
        scores = []
        for score, span, held in zip(prefill.scores, spans, positions.view(len(spans), entries.heads, -1), strict=True):
            places = (held - span.start).long()
            of_prompt = (places >= 0) & (places < span.length)
            scores.append(score.gather(1, places.clamp(0, span.length - 1)) * of_prompt)
        self.scores = torch.stack(scores).view_as(positions)

    @classmethod
    def join(
        cls, rings: Sequence[Any], parts: Sequence[KVStore], padding: Sequence[int], entries: KVStore, seen: int
    ) -> "HeavyHitters":
        """:meth:`Allowance.join`; every entry keeps its score, whatever slot it has now."""
        joined: HeavyHitters = super().join(rings, parts, padding, entries, seen)
        joined.protect(entries)
        scores = []
        rows = entries.positions.split([len(ring.shares) for ring in rings])
        for ring, part, later, positions in zip(rings, parts, padding, rows, strict=True):
            # By position, with a place in front for what is vacant.
            length = seen - later
            by_position = ring.scores.new_zeros(*ring.scores.shape[:2], length + 1)
            by_position.scatter_(2, part.positions.long() + 1, ring.scores)
            places = (positions - later + 1).where(positions != VACANT, 0).long()
            scores.append(by_position.gather(2, places))
        joined.scores = torch.cat(scores) * (entries.positions != VACANT)
        return joined

    def write(self, entries: KVStore, keys: Tensor, values: Tensor, position: int) -> None:
        """Take in one new token's entries, ``[B, H_kv, 1, D]``."""
        self.protect(entries)
        grow = [count == 0 for count in self.make_room(entries, position)]
        entries.overwrite(keys, values, position, self._slots(entries, grow), grow)
        # What took the place of an entry does not inherit its score.
        self.scores = self.scores.masked_fill(entries.positions == position, 0)

    def vacate(self, entries: KVStore, dropped: list[bool]) -> None:
        """:meth:`Allowance.vacate`."""
        entries.vacate(self._slots(entries, [not gone for gone in dropped]), dropped)

    def attend(self, entries: KVStore, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """Attend, and remember what was attended to."""
        output, got = entries.attend_and_tell(query, recent_mask, scaling)
        self.scores = self.fitted(entries) + got.detach()
        return output

    def fitted(self, entries: KVStore) -> Tensor:
        """The scores of all slots, those that the storage has grown by included."""
        return functional.pad(self.scores, (0, entries.positions.shape[2] - self.scores.shape[2]))

    def _slots(self, entries: KVStore, grow: list[bool]) -> Tensor:
        self.scores = self.fitted(entries)
        recent, may_grow = torch.tensor([self.protected, grow], device=entries.positions.device)
        return slot_of_lowest(entries.positions, self.scores, recent, may_grow.bool())

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by those at ``index``, a tensor on the CPU."""
        super().select_rows(index)
        self.scores = self.scores.index_select(0, index.to(self.scores.device))

    def replace(self, rows: slice, other: Any) -> None:
        """:meth:`Allowance.replace`."""
        super().replace(rows, other)
        self.scores[rows] = 0
        self.scores[rows, :, : other.scores.shape[2]] = other.scores
