"""Rows of a pool: what belongs to a sequence, to an eviction rule and to one attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsight.attention.decode import Tiles, tiled
from sparsight.cache.kv_pool import KVPool
from sparsight.cache.prompt_recall import PromptRecall
from sparsight.compression.eviction import VACANT, EvictionRule, EvictionState

CAPACITY_STEP = 16
"""Slots of a row are a multiple of it."""


class Rows:
    """Rows of a pool, as an eviction rule reads them.

    Args:
        pool: where they are.
        heads: KV heads of each sequence.
        numbers: int64 ``[4, N]``: the first slot of each row, its slots, entries held, and slots up to the last
            occupied one.
        longest: slots of the longest row.
    """

    def __init__(self, pool: KVPool, heads: int, numbers: Tensor, longest: int) -> None:
        self.pool, self.heads, self.longest = pool, heads, longest
        self.starts, self.capacities, self.held, self.used = numbers

    def by_row(self, flat: Tensor, vacant: float) -> Tensor:
        """A number of each slot, ``[slots]``, as ``[N, longest]``; ``vacant`` behind the last slot of a shorter row."""
        index, beyond = self.slots()
        return flat[index].masked_fill_(beyond, vacant)

    def slots(self) -> tuple[Tensor, Tensor]:
        """Where each row's slots are, ``[N, longest]``, and bool which of these a shorter row does not have."""
        slot = torch.arange(self.longest, device=self.starts.device)
        beyond = slot >= self.capacities[:, None]
        return (self.starts[:, None] + slot).masked_fill_(beyond, 0), beyond

    @property
    def positions(self) -> Tensor:
        """The position of the token in each slot, int32 ``[N, longest]``, -1 where the slot is vacant."""
        return self.by_row(self.pool.positions, VACANT)


@dataclass(frozen=True)
class Member:
    """One sequence of a batch, as the host knows it.

    Attributes:
        start: where its extent begins.
        slots: how long it is.
        rule: which slot each new entry takes.
        starts: the first slot of each row, by layer and KV head.
        capacities: slots of each row, by layer and KV head.
        recalls: by layer, what fetches entries of the prompt back; empty where the rule does not.
    """

    start: int
    slots: int
    rule: EvictionRule
    starts: list[list[int]]
    capacities: list[list[int]]
    recalls: Sequence[PromptRecall] = ()

    @cached_property
    def is_even(self) -> bool:
        """Whether the KV heads of each layer have equally many slots."""
        return all(len(set(layer)) == 1 for layer in self.capacities)

    def is_followed_by(self, other: "Member") -> bool:
        """Whether the extent of ``other`` is the next one, and is used alike."""
        same = self.is_even and self.capacities == other.capacities
        return same and self.rule == other.rule and self.start + self.slots == other.start


class Group(NamedTuple):
    """The rows about which one rule decides.

    Attributes:
        rule: the rule.
        columns: which of the batch's rows, the same in each layer.
        longest: slots of the longest row.
        state: of these rows, those of all layers one after the other.
    """

    rule: EvictionRule
    columns: Tensor | slice
    longest: int
    state: EvictionState


class Strip(NamedTuple):
    """Rows of a layer that one attention can take: equally long ones, of sequences whose extents follow each other.

    Attributes:
        start: the first slot.
        sequences: how many sequences.
        stride: slots from one sequence to the next.
        rows: rows of each sequence.
        capacity: slots of each row.
        used: slots of the longest row up to the last occupied one.
        vacancies: whether some of these are vacant.
    """

    start: int
    sequences: int
    stride: int
    rows: int
    capacity: int
    used: int
    vacancies: bool

    def of(self, flat: Tensor) -> Tensor:
        """The used slots of ``flat`` ``[slots, ...]``: a view ``[sequences, rows, used, ...]``."""
        size = flat[0].numel()
        shape = self.sequences, self.rows, self.used, *flat.shape[1:]
        strides = [size * each for each in (self.stride, self.capacity, 1)] + [1] * (flat.ndim - 1)
        return flat.as_strided(shape, strides, self.start * size)


def tiles_of(starts: Tensor, used: Tensor, positions: Tensor) -> list[Tiles]:
    """The tiles of :data:`CAPACITY_STEP` slots that the rows of each layer use.

    Args:
        starts: int64 ``[L, N]``, the first slot of each row, a multiple of the step.
        used: int64 ``[L, N]``, slots up to the last occupied one.
        positions: int32 ``[slots]`` of the pool, -1 where a slot is vacant.
    """
    layers, rows = starts.shape
    by_layer = (used + CAPACITY_STEP - 1) // CAPACITY_STEP
    counts = by_layer.flatten()
    row = torch.arange(layers * rows, device=starts.device).repeat_interleave(counts)
    nth = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    tile, longest = starts.flatten()[row] // CAPACITY_STEP + nth, int(counts.max())
    vacant = tiled(positions, CAPACITY_STEP)[tile] == VACANT
    bias = torch.zeros(vacant.shape, device=vacant.device).masked_fill_(vacant, -torch.inf)[:, None]
    row %= rows
    parts = zip(*(each.split(by_layer.sum(1).tolist()) for each in (tile, row, row * longest + nth, bias)), strict=True)
    return [Tiles(own_tile, own_row, place, mask, longest) for own_tile, own_row, place, mask in parts]


def rounded_up(slots: Any) -> Any:
    """Slots of a row, a number or a tensor, as a multiple: sequences of similar length get extents of the same kind."""
    return (slots + CAPACITY_STEP - 1) // CAPACITY_STEP * CAPACITY_STEP
