"""Indexes of a prompt's keys: what stays resident of them, and from it the logits of a query for every position."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.utils import checks

BITS = (4, 8)
"""Bits that a component of a key can have."""


class KeyIndex(ABC):
    """How the keys of a prompt are indexed.

    Attributes:
        kind: the index's name in a recipe.
        resident: whether the index is made of copies, which stay on the device of the keys that are resident.
    """

    kind: ClassVar[str]
    resident: ClassVar[bool] = True

    @abstractmethod
    def build(self, keys: Tensor) -> tuple[Tensor, ...]:
        """The index of keys ``[H_kv, T, D]``."""

    @abstractmethod
    def logits(self, query: Tensor, index: tuple[Tensor, ...], length: int) -> Tensor:
        """Query times key, or an estimate of it up to a constant of each query, float32 ``[H_kv, G, T]``.

        Args:
            query: float32 ``[H_kv, G, D]``, the query heads of each KV head.
            index: what :meth:`build` returned.
            length: ``T``.
        """


@dataclass(frozen=True)
class Exact(KeyIndex):
    """The keys themselves, where the full keys are: nothing else is resident."""

    kind: ClassVar[str] = "exact"
    resident: ClassVar[bool] = False

    def build(self, keys: Tensor) -> tuple[Tensor, ...]:
        """The keys, not copied."""
        return (keys,)

    def logits(self, query: Tensor, index: tuple[Tensor, ...], length: int) -> Tensor:
        """Query times key."""
        (keys,) = index
        # In this order the product of a single query is faster.
        return (keys.float() @ query.mT).mT


@dataclass(frozen=True)
class BlockBounds(KeyIndex):
    """Smallest and largest value of each component in blocks of keys (Quest, arXiv 2406.10774, section 3.3).

    The logits are an upper bound for all keys of a block, ``sum_d max(q_d min_d, q_d max_d)``.

    Args:
        block: consecutive positions in a block. The index has ``1 / block`` of the bytes of the keys and values.
    """

    kind: ClassVar[str] = "block-bounds"
    block: int = 4

    def __post_init__(self) -> None:
        checks.count("block", self.block, least=1)

    def build(self, keys: Tensor) -> tuple[Tensor, ...]:
        """The largest and the smallest values ``[H_kv, ceil(T / block), 2 D]``."""
        # The last block is filled up with copies of the last key.
        filled = torch.cat([keys, keys[:, -1:].expand(-1, -keys.shape[1] % self.block, -1)], 1)
        blocks = filled.unflatten(1, (-1, self.block))
        return (torch.cat([blocks.amax(2), blocks.amin(2)], -1),)

    def logits(self, query: Tensor, index: tuple[Tensor, ...], length: int) -> Tensor:
        """The bound of each position's block."""
        (bounds,) = index
        by_sign = torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)
        return (by_sign @ bounds.float().mT).repeat_interleave(self.block, -1)[..., :length]


@dataclass(frozen=True)
class LowRank(KeyIndex):
    """Principal components of the keys of each KV head, of few bits each.

    The mean key is left out: it adds the same to the logits of every position.

    Args:
        rank: components; even, as two of 4 bits share a byte.
        bits: of each component, 4 or 8.
    """

    kind: ClassVar[str] = "low-rank"
    rank: int = 8
    bits: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 2 or self.rank % 2:
            raise ValueError(f"rank must be an even whole number of at least 2, got {self.rank!r}.")
        if self.bits not in BITS:
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}.")

    def build(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Codes uint8 ``[H_kv, T, rank * bits / 8]``, and the component of a code's unit ``[H_kv, D, rank]``."""
        centred = keys.float() - keys.float().mean(1, keepdim=True)
        # In ascending order of their eigenvalues.
        basis = torch.linalg.eigh(centred.mT @ centred).eigenvectors[..., -self.rank :]
        components = centred @ basis
        low = components.amin(1, keepdim=True)
        unit = (components.amax(1, keepdim=True) - low).div_(2**self.bits - 1)
        codes = ((components - low) / unit.clamp(min=torch.finfo(unit.dtype).tiny)).round().to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        return codes, basis * unit

    def logits(self, query: Tensor, index: tuple[Tensor, ...], length: int) -> Tensor:
        """Query times the codes' components, without the constant that they begin at."""
        codes, basis = index
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
        return (query @ basis) @ codes.float().mT
