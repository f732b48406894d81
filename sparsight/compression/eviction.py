"""Eviction rules: which entry each new one replaces while the answer is generated.

Keys carry their rotary position and attention does not depend on the order of its entries, so dropping an entry and
appending the new one is overwriting one slot. Everything here is tensors, and a step reads none of them on the host:
the same code runs eagerly, in a CUDA graph and compiled. Only what a rule recalls is fetched outside of it. A row is
one KV head of one sequence, ``N = B * H_kv``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.models.prompt import Span
from sparsight.utils import checks

NEVER = torch.iinfo(torch.int32).max
"""A position that no token reaches."""

ROUNDING = 1e-9
"""What an allowance may exceed an integer by without allowing another entry."""

VACANT = -1
"""The position of a slot without an entry."""


class Rows(Protocol):
    """What an eviction rule reads of the rows of one layer."""

    heads: int
    """KV heads of each sequence."""

    @property
    def held(self) -> Tensor:
        """Entries of each row, int64 ``[N]``."""

    @property
    def used(self) -> Tensor:
        """Slots up to the last occupied one, int64 ``[N]``."""

    @property
    def positions(self) -> Tensor:
        """The position of the token in each slot, int32 ``[N, C]``, -1 where the slot is vacant."""


@dataclass
class EvictionState:
    """How many entries each row may hold, and what decides which of them goes.

    A layer that kept a share of the prompt may hold that share of all tokens seen. The entries of a new turn of a
    conversation are added as they are and raise the allowance by their number.

    Attributes:
        ratio: float64 ``[N]``, entries that may be held for every token seen.
        excluded: float64 ``[N]``, tokens seen that do not count: padding, and the tokens of new turns.
        turn_tokens: float64 ``[N]``, tokens of new turns.
        protected: int64 ``[N]``, entries that may not be dropped.
        boundary: int32 ``[N]``, the position from which on entries may be dropped, for rules with a fixed place.
        scores: float32 ``[N, C]``, the attention that each slot's entry received, where the rule tracks it; else empty.
        rounded: whether the number of entries kept of a prompt may be one more than the allowance, as it is rounded.
    """

    ratio: Tensor
    excluded: Tensor
    turn_tokens: Tensor
    protected: Tensor
    boundary: Tensor
    scores: Tensor
    rounded: bool = field(default=True, kw_only=True)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the above."""
        return self.ratio, self.excluded, self.turn_tokens, self.protected, self.boundary, self.scores

    def allowance(self, seen: Tensor | int) -> Tensor:
        """Entries that each row may hold once ``seen`` tokens have been processed, float64 ``[N]``."""
        return torch.addcmul(self.turn_tokens, self.ratio, seen - self.excluded)

    @staticmethod
    def combine(
        states: Sequence["EvictionState"], combined: Callable[[list[Tensor]], Tensor], scores: Tensor | None = None
    ) -> "EvictionState":
        """One state of several, each tensor but the scores ``combined`` from theirs."""
        by_field = [list(each) for each in zip(*(state.tensors for state in states), strict=True)]
        ratio, excluded, turns, protected, boundary = map(combined, by_field[:-1])
        scores = by_field[-1][0].new_empty(0) if scores is None else scores
        return EvictionState(ratio, excluded, turns, protected, boundary, scores)

    def select(self, index: Tensor) -> "EvictionState":
        """The state of the rows at ``index``."""
        return EvictionState(*(each[index] for each in self.tensors), rounded=self.rounded)


class EvictionRule(ABC):
    """Which slot each new entry takes.

    Attributes:
        kind: the rule's name in a recipe.
        croppable: whether new entries can be taken back, because they never replace older ones.
        tracks_attention: whether the rule goes by the attention that entries receive while the answer is generated.
        recalls: whether entries of the prompt are fetched back, for which the full cache is kept. Such steps cannot be
            captured or compiled.
    """

    kind: ClassVar[str]
    croppable: ClassVar[bool] = False
    tracks_attention: ClassVar[bool] = False
    recalls: ClassVar[bool] = False

    @abstractmethod
    def protected(self, held: Tensor) -> Tensor:
        """How many of ``held`` entries, int64 ``[N]``, may not be dropped."""

    @abstractmethod
    def order(self, rows: Rows, state: EvictionState) -> Tensor:
        """The order in which entries go, ``[N, C]``: the lowest first, the largest value where one may not go."""

    def protect(self, rows: Rows, state: EvictionState, seen: int) -> None:
        """Let what is protected follow from the entries held after the prompt or a new turn, ``seen`` tokens so far."""
        state.protected = self.protected(rows.held)
        state.boundary = position_at(state.protected, rows, seen)

    def grows(self, held: Tensor, state: EvictionState, seen: Tensor) -> Tensor:
        """Which rows hold one entry more with their newest token: those that may, or have none that may go.

        Elementwise, so that one call answers for the rows of all layers.

        Args:
            held: int64 ``[..., N]``, entries held before.
            state: of these rows.
            seen: float64 ``[N]``, tokens seen, the new one included.

        Returns:
            Bool ``[..., N]``.
        """
        least = self.protected_now(held, state) + 1
        return held + 1 <= torch.maximum(state.allowance(seen), least)

    def slots(self, rows: Rows, state: EvictionState, grows: Tensor) -> Tensor:
        """The slot that the entry of each row's newest token takes, int64 ``[N]``.

        Rows that grow take a vacant slot, of which they must have one; the others overwrite the first in
        :meth:`order`.
        """
        # Of the positions as they are, those of vacant slots are the lowest.
        return torch.where(grows[:, None], rows.positions, self.order(rows, state)).argmin(-1)

    def excess(self, rows: Rows, state: EvictionState, seen: int) -> Tensor:
        """Slots to vacate so that the token at position ``seen`` replaces one entry a row at most, bool ``[N, C]``."""
        drops = (rows.held + 1 - state.allowance(seen + 1)).ceil()
        drops = torch.minimum(drops, (rows.held - self.protected_now(rows.held, state)).double()) - 1
        rank = self.order(rows, state).argsort(dim=-1, stable=True).argsort(dim=-1)
        return rank < drops[:, None]

    def protected_now(self, held: Tensor, state: EvictionState) -> Tensor:
        """How many of ``held`` entries are protected at this token."""
        return state.protected

    def growth(self, rows: Rows, state: EvictionState, seen: int, tokens: int) -> int:
        """Slots that the rows may come to need for ``tokens`` more tokens, after ``seen``."""
        return tokens

    def first_scores(self, scores: Tensor, places: Tensor, span: Span) -> Tensor:
        """Scores ``[H_kv, C]`` of a sequence's entries at ``places`` in the prompt, before the first new token."""
        return scores

    def record(self, scores: Tensor, received: Tensor) -> None:
        """Update entries' scores in place with the attention, of the same shape, that they received from a token."""
        scores.add_(received)


class Ring(EvictionRule):
    """From a fixed place on, each new entry overwrites the oldest one."""

    def order(self, rows: Rows, state: EvictionState) -> Tensor:
        """By age, from the fixed place on."""
        return torch.where(rows.positions >= state.boundary[:, None], rows.positions, NEVER)

    def slots(self, rows: Rows, state: EvictionState, grows: Tensor) -> Tensor:
        """:meth:`EvictionRule.slots` in fewer operations."""
        limit = state.boundary.masked_fill(grows, VACANT)
        # How far each position is ahead of the limit; without the sign bit, positions before it are the largest.
        return torch.sub(rows.positions, limit[:, None]).bitwise_and_(NEVER).argmin(-1)

    def growth(self, rows: Rows, state: EvictionState, seen: int, tokens: int) -> int:
        """Up to the allowance, and one entry more than may not go."""
        most = torch.maximum(state.allowance(seen + tokens).ceil(), state.protected + 1.0)
        return min(max(int((most - rows.held).max()), 0), tokens) + 1


@dataclass(frozen=True)
class Grow(EvictionRule):
    """Nothing is dropped: every entry is protected and each new one is appended."""

    kind: ClassVar[str] = "grow"
    croppable: ClassVar[bool] = True

    def protected(self, held: Tensor) -> Tensor:
        """All of them."""
        return torch.full_like(held, NEVER)

    def order(self, rows: Rows, state: EvictionState) -> Tensor:
        """No entry goes."""
        return torch.full_like(rows.positions, NEVER)

    def excess(self, rows: Rows, state: EvictionState, seen: int) -> Tensor:
        """None."""
        return torch.zeros_like(rows.positions, dtype=torch.bool)

    def grows(self, held: Tensor, state: EvictionState, seen: Tensor) -> Tensor:
        """All rows."""
        return torch.ones_like(held, dtype=torch.bool)

    def slots(self, rows: Rows, state: EvictionState, grows: Tensor) -> Tensor:
        """The slot after the last one used, without looking at positions."""
        return rows.used


@dataclass(frozen=True)
class FixedPoint(Ring):
    """Drop the entry at a fixed place (Elastic Cache, arXiv 2407.18121, section 3.3).

    The fixed place is ``distance`` before the end of the entries kept after prefill: the oldest and the most recent
    part both stay. As in the authors' code, a layer may hold its share of the tokens seen, rounded up, and one entry
    leaves per token.

    Args:
        distance: entries between the fixed place and the end of what was kept after prefill.
        protect_first: entries at the beginning of the cache that are never dropped.
        middle: where the fixed place would be among those first entries, take the middle of what was kept instead
            (PrefixKV, arXiv 2412.03409).
    """

    kind: ClassVar[str] = "fixed-point"
    distance: int = 25
    protect_first: int = 1
    middle: bool = False

    def __post_init__(self) -> None:
        checks.count("distance", self.distance)
        checks.count("protect_first", self.protect_first)

    def protected(self, held: Tensor) -> Tensor:
        """Those before the fixed place."""
        place = held - self.distance
        return torch.where(place < self.protect_first, held // 2 if self.middle else self.protect_first, place)

    def grows(self, held: Tensor, state: EvictionState, seen: Tensor) -> Tensor:
        """:meth:`EvictionRule.grows` with the allowance rounded up."""
        return held < torch.maximum(state.allowance(seen) - ROUNDING, state.protected + 1)

    def excess(self, rows: Rows, state: EvictionState, seen: int) -> Tensor:
        """None: what rounding kept of a prompt is within the allowance rounded up."""
        return torch.zeros_like(rows.positions, dtype=torch.bool)


@dataclass(frozen=True)
class Sliding(Ring):
    """Drop the oldest entry except the first ones (StreamingLLM, arXiv 2309.17453).

    Args:
        sinks: entries at the beginning of the cache that are never dropped.
    """

    kind: ClassVar[str] = "sliding"
    sinks: int = 4

    def __post_init__(self) -> None:
        checks.count("sinks", self.sinks)

    def protected(self, held: Tensor) -> Tensor:
        """The sinks."""
        return torch.full_like(held, self.sinks)


@dataclass(frozen=True)
class HeavyHitter(EvictionRule):
    """Drop the entry that received the least attention, except the most recent ones (H2O, arXiv 2306.14048, section 4).

    What an entry received during prefill counts, by the recipe's score, and what it receives from every token of the
    answer.

    Args:
        recent: fraction of the entries held that are the most recent ones and stay.
    """

    kind: ClassVar[str] = "heavy-hitter"
    tracks_attention: ClassVar[bool] = True
    recent: float = 0.5

    def __post_init__(self) -> None:
        checks.fraction("recent", self.recent, zero=True)

    def protected(self, held: Tensor) -> Tensor:
        """The most recent ones, at least the last."""
        return (self.recent * held.double()).round().clamp(min=1).long()

    def protected_now(self, held: Tensor, state: EvictionState) -> Tensor:
        """As many as the entries held now ask for."""
        return self.protected(held)

    def order(self, rows: Rows, state: EvictionState) -> Tensor:
        """By score, before the recent entries."""
        # In ascending order of position vacant slots come first.
        begin = (rows.positions.shape[1] - self.protected(rows.held)).clamp(min=0)
        recent_from = rows.positions.sort(-1).values.gather(-1, begin[:, None])
        may_go = (rows.positions >= 0) & (rows.positions < recent_from)
        return torch.where(may_go, state.scores, torch.inf)


def position_at(index: Tensor, rows: Rows, seen: int) -> Tensor:
    """Position of the entry with index ``index`` ``[N]`` in order of position, int32 ``[N]``.

    Past the end it is the position that this entry will have if all coming tokens, from ``seen`` on, are appended.
    """
    capacity = rows.positions.shape[1]
    # In ascending order of position vacant slots come first.
    place = (capacity - rows.held + index).clamp(max=capacity - 1)
    found = rows.positions.sort(-1).values.gather(-1, place[:, None])[:, 0]
    coming = (seen + index - rows.held).clamp(max=NEVER)
    return torch.where(index < rows.held, found, coming).int()


@torch.inference_mode(False)
def fitted(scores: Tensor, capacity: int) -> Tensor:
    """Scores ``[N, C]`` for rows of ``capacity`` slots; scores of a rule that does not track attention stay empty."""
    missing = capacity - scores.shape[1]
    return functional.pad(scores, (0, missing)) if missing and scores.shape[1] else scores
