"""Decoding within an allowance in one layer: which slot of the storage each new entry takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.entries import VACANT
from sparsight.parts import FixedPoint, HeavyHitter, Sliding
from sparsight.parts.decode import drops, slot_of_lowest, slot_to_write
from sparsight.prefill import Prefill
from sparsight.ragged import Held


class Ring:
    """What a decode rule that drops entries must remember between tokens, for each row of one layer's entries.

    A row is a sequence, or one KV head of a sequence where the heads hold different numbers of entries.

    The entries from the fixed place on are a ring: a new one overwrites the oldest of them. A new turn of a
    conversation is added as it is, raises the allowance by its tokens, and moves the fixed place.

    Attributes:
        shares: fraction of the tokens seen that may be held.
        padding: padding tokens among those seen.
        turn_tokens: tokens of new turns among those seen.
        indices, positions: index and position (int32 ``[R, 1 or H_kv]``) of the entry at the fixed place.
    """

    def __init__(
        self, rule: FixedPoint | Sliding | HeavyHitter, shares: Sequence[float], padding: Sequence[int]
    ) -> None:
        self.rule = rule
        self.shares, self.padding = list(shares), list(padding)
        self.turn_tokens = [0] * len(self.shares)
        self.indices: list[int] = []
        self.positions = torch.empty(0, dtype=torch.int32)

    def start(self, entries: Held, prefill: Prefill, seen: int) -> None:
        """Begin with the entries kept of a prompt, after ``seen`` tokens."""
        self.fix(entries, seen)

    @classmethod
    def join(
        cls, rings: Sequence[Any], parts: Sequence[Held], padding: Sequence[int], entries: Held, seen: int
    ) -> "Ring":
        """The rows of several rings that have written nothing yet, in a ring for ``entries`` of ``seen`` tokens.

        The entries of ``rings[i]`` were ``parts[i]``, at positions ``padding[i]`` earlier.
        """
        joined = cls(*_joined_numbers(rings, padding))
        joined.fix(entries, seen)
        return joined

    def attend(self, entries: Held, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """:meth:`Entries.attend`."""
        return entries.attend(query, recent_mask, scaling)

    def fix(self, entries: Held, seen: int) -> None:
        """Put the fixed place where it belongs for the entries held now, of ``seen`` tokens."""
        self.indices = [self.rule.fixed_index(held) for held in entries.held]
        self.positions = entries.positions_at(self.indices, next_position=seen)

    def add_turn(self, entries: Held, before: Sequence[int], count: int, seen: int) -> None:
        """Note that a turn of ``count`` tokens, padding included, was appended where ``before`` entries were held."""
        added = [held - old for held, old in zip(entries.held, before, strict=True)]
        self.turn_tokens = [tokens + new for tokens, new in zip(self.turn_tokens, added, strict=True)]
        self.padding = [tokens + count - new for tokens, new in zip(self.padding, added, strict=True)]
        self.fix(entries, seen)

    def write(self, entries: Held, keys: Tensor, values: Tensor, position: int) -> None:
        """Take in one new token's entries, ``[B, H_kv, 1, D]``."""
        gone = [
            drops(held, share * (position + 1 - padding - turn) + turn, index)
            for held, share, padding, turn, index in zip(
                entries.held, self.shares, self.padding, self.turn_tokens, self.indices, strict=True
            )
        ]
        entries.reserve(1)
        # More than one entry goes only where the number kept after prefill was rounded up.
        while max(gone) > 1:
            entries.vacate(self._slots(entries, [count < 2 for count in gone]), [count > 1 for count in gone])
            gone = [count - (count > 1) for count in gone]
        grow = [count == 0 for count in gone]
        entries.overwrite(keys, values, position, self._slots(entries, grow), grow)

    def _slots(self, entries: Held, grow: list[bool]) -> Tensor:
        """Slot of each row that is vacant, where ``grow``, or else is next to go, ``[R, 1 or H_kv]``."""
        return slot_to_write(entries.positions, self.positions, torch.tensor(grow, device=entries.positions.device))

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by those at ``index``, a tensor on the CPU."""
        rows = index.tolist()
        self.shares = [self.shares[row] for row in rows]
        self.padding = [self.padding[row] for row in rows]
        self.turn_tokens = [self.turn_tokens[row] for row in rows]
        self.indices = [self.indices[row] for row in rows]
        self.positions = self.positions.index_select(0, index.to(self.positions.device))


class HeavyHitters(Ring):
    """A ring whose new entries overwrite the entry that has been attended to least.

    Attributes:
        scores: float32 ``[R, 1 or H_kv, capacity]``, the attention that each slot's entry got so far.
    """

    def start(self, entries: Held, prefill: Prefill, seen: int) -> None:
        """Begin with the entries kept of a prompt, and the scores that they had in it."""
        self.fix(entries, seen)
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
        cls, rings: Sequence[Any], parts: Sequence[Held], padding: Sequence[int], entries: Held, seen: int
    ) -> "HeavyHitters":
        """:meth:`Ring.join`; every entry keeps its score, whatever slot it has now."""
        joined = cls(*_joined_numbers(rings, padding))
        joined.fix(entries, seen)
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

    def fix(self, entries: Held, seen: int) -> None:
        """Note how many entries are recent of those held now, and where they begin."""
        self.indices = [self.rule.fixed_index(held) for held in entries.held]
        begin = [held - recent for held, recent in zip(entries.held, self.indices, strict=True)]
        self.positions = entries.positions_at(begin, next_position=seen)

    def write(self, entries: Held, keys: Tensor, values: Tensor, position: int) -> None:
        """Take in one new token's entries, ``[B, H_kv, 1, D]``."""
        self.fix(entries, position)
        super().write(entries, keys, values, position)
        # What took the place of an entry does not inherit its score.
        self._fit(entries)
        self.scores = self.scores.masked_fill(entries.positions == position, 0)

    def attend(self, entries: Held, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """Attend, and remember what was attended to."""
        output, got = entries.attend_and_tell(query, recent_mask, scaling)
        self._fit(entries)
        self.scores = self.scores + got
        return output

    def _fit(self, entries: Held) -> None:
        """Let the scores grow with the storage."""
        self.scores = functional.pad(self.scores, (0, entries.positions.shape[2] - self.scores.shape[2]))

    def _slots(self, entries: Held, grow: list[bool]) -> Tensor:
        self._fit(entries)
        may_grow = torch.tensor(grow, device=entries.positions.device)
        return slot_of_lowest(entries.positions, self.scores, self.positions, may_grow)

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by those at ``index``, a tensor on the CPU."""
        super().select_rows(index)
        self.scores = self.scores.index_select(0, index.to(self.scores.device))


def _joined_numbers(rings: Sequence[Ring], padding: Sequence[int]) -> tuple[Any, list[float], list[int]]:
    """Rule, shares and padding of the rows of several rings, with ``padding[i]`` more tokens in front of each."""
    shares = [share for ring in rings for share in ring.shares]
    joined_padding = [own + more for ring, more in zip(rings, padding, strict=True) for own in ring.padding]
    return rings[0].rule, shares, joined_padding
