"""Allocations: how the budget is shared among the layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.parts import check


@dataclass(frozen=True)
class Uniform:
    """Every layer keeps the same share."""

    kind: ClassVar[str] = "uniform"
    threshold: ClassVar[float | None] = None

    def shares(self, sparsity: Tensor, budget: float) -> Tensor:
        """Share of the prompt's entries that each layer keeps, float64 ``[L]``, for sparsities ``[L]``."""
        return torch.full(sparsity.shape, budget, dtype=torch.float64)


@dataclass(frozen=True)
class SparsityAware:
    """Dense layers keep more: shares in proportion to ``1 - sparsity`` (VL-Cache, arXiv 2410.23317, algorithm 1).

    Args:
        threshold: ``p`` of the filter that sparsity is measured with (equation 1): an attention weight counts as zero
            below ``p`` times the largest of its row.
        floor: least share of a layer.
        water_fill: what clipping adds or removes is handed back to the unclipped layers, so that the mean share is the
            budget. Without it the shares are clipped as the paper does and the mean may differ from the budget.
    """

    kind: ClassVar[str] = "sparsity"
    threshold: float = 0.01
    floor: float = 0.01
    water_fill: bool = True

    def __post_init__(self) -> None:
        check.fraction("threshold", self.threshold)
        check.fraction("floor", self.floor, zero=True)

    def shares(self, sparsity: Tensor, budget: float) -> Tensor:
        """Share of the prompt's entries that each layer keeps, float64 ``[L]``, for sparsities ``[L]``."""
        density = 1 - sparsity.double()
        total = budget * len(density)
        if self.water_fill:
            return _water_fill(density, total, min(self.floor, budget))
        return (density / density.sum() * total).clamp(self.floor, 1.0)


def _water_fill(weights: Tensor, total: float, floor: float) -> Tensor:
    """Shares in proportion to ``weights``, each in ``[floor, 1]``, that sum to ``total``."""
    # The sum of clamp(scale * weights) rises with the scale and bends only where a layer meets a bound: the scale lies
    # between two bends, and between them the sum is linear.
    bends = torch.cat([floor / weights, 1 / weights]).sort().values
    sums = (bends[:, None] * weights).clamp(floor, 1.0).sum(-1)
    above = int(torch.searchsorted(sums, total).clamp(1, len(bends) - 1))
    low, high = sums[above - 1], sums[above]
    step = ((total - low) / (high - low)).clamp(0, 1) if high > low else sums.new_zeros(())
    scale = torch.lerp(bends[above - 1], bends[above], step)
    return (scale * weights).clamp(floor, 1.0)


Allocate = Uniform | SparsityAware
