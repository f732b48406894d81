"""Decoding within an allowance in one layer: which slot of the storage each new entry takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.entries import Entries
from sparsight.parts import FixedPoint, Sliding
from sparsight.parts.decode import drops, slot_to_write


class Ring:
    """What a decode rule that drops entries must remember between tokens, for each sequence of one layer.

    The entries from the fixed place on are a ring: a new one overwrites the oldest of them. A new turn of a
    conversation is added as it is, raises the allowance by its tokens, and moves the fixed place.

    Attributes:
        shares: fraction of the tokens seen that may be held.
        padding: padding tokens among those seen.
        turn_tokens: tokens of new turns among those seen.
        indices, positions: index and position (int32 ``[B, H_kv]``) of the entry at the fixed place.
    """

    def __init__(self, rule: FixedPoint | Sliding, shares: Sequence[float], padding: Sequence[int]) -> None:
        self.rule = rule
        self.shares, self.padding = list(shares), list(padding)
        self.turn_tokens = [0] * len(self.shares)
        self.indices: list[int] = []
        self.positions = torch.empty(0, dtype=torch.int32)

    def fix(self, entries: Entries, seen: int) -> None:
        """Put the fixed place where it belongs for the entries held now, of ``seen`` tokens."""
        self.indices = [self.rule.fixed_index(held) for held in entries.held]
        self.positions = entries.positions_at(self.indices, next_position=seen)

    def add_turn(self, entries: Entries, before: Sequence[int], count: int, seen: int) -> None:
        """Note that a turn of ``count`` tokens, padding included, was appended where ``before`` entries were held."""
        added = [held - old for held, old in zip(entries.held, before, strict=True)]
        self.turn_tokens = [tokens + new for tokens, new in zip(self.turn_tokens, added, strict=True)]
        self.padding = [tokens + count - new for tokens, new in zip(self.padding, added, strict=True)]
        self.fix(entries, seen)

    def write(self, entries: Entries, keys: Tensor, values: Tensor, position: int) -> None:
        """Take in one new entry a sequence, ``[B, H_kv, 1, D]``."""
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

    def _slots(self, entries: Entries, grow: list[bool]) -> Tensor:
        """Slot of each sequence and KV head that is vacant, where ``grow``, or else is next to go, ``[B, H_kv]``."""
        return slot_to_write(entries.positions, self.positions, torch.tensor(grow, device=entries.positions.device))

    def select_rows(self, index: Tensor) -> None:
        """Replace the sequences by those at ``index``, a tensor on the CPU."""
        rows = index.tolist()
        self.shares = [self.shares[row] for row in rows]
        self.padding = [self.padding[row] for row in rows]
        self.turn_tokens = [self.turn_tokens[row] for row in rows]
        self.indices = [self.indices[row] for row in rows]
        self.positions = self.positions.index_select(0, index.to(self.positions.device))
