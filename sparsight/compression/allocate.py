"""Allocations: how the budget is shared among the layers, from what each layer's prefill showed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.utils import checks


@dataclass(frozen=True)
class LayerStatistics:
    """What the prefill of one sequence showed in one layer.

    Args:
        score: importance of each position, float32 ``[H_kv, T]``.
        sparsity: of the post-vision queries; 0 where the allocation has no threshold to measure it with.
        vision: bool ``[T]``, the position is a vision token's.
        always: bool ``[T]``, the position stays whatever its score, when the budget is shared equally.
        to_vision: attention that the post-vision queries pay to vision tokens, summed over both and averaged over the
            heads, float32 scalar; 0 where the allocation does not use it.
    """

    score: Tensor
    sparsity: float
    vision: Tensor
    always: Tensor
    to_vision: Tensor = field(default_factory=lambda: torch.zeros(()))


KeepRatio = float | list[float]
"""Share of the prompt's entries that a layer keeps, or of each of its KV heads."""


def gather_to_cpu(layers: Iterable[Tensor]) -> Tensor:
    """What several layers, maybe on several devices, have of the same shape, stacked on the CPU by one copy."""
    first, *others = layers
    return torch.stack([first, *(other.to(first.device, non_blocking=True) for other in others)]).cpu()


@dataclass(frozen=True)
class Uniform:
    """Every layer keeps the same share."""

    kind: ClassVar[str] = "uniform"
    head_wise: ClassVar[bool] = False
    threshold: ClassVar[float | None] = None

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each layer keeps."""
        return [budget] * len(layers)


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
    head_wise: ClassVar[bool] = False
    threshold: float = 0.01
    floor: float = 0.01
    water_fill: bool = True

    def __post_init__(self) -> None:
        checks.fraction("threshold", self.threshold)
        checks.fraction("floor", self.floor, zero=True)

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each layer keeps."""
        density = torch.tensor([1 - layer.sparsity for layer in layers], dtype=torch.float64)
        total = budget * len(density)
        if self.water_fill:
            return water_fill(density, total, min(self.floor, budget)).tolist()
        return (density / density.sum() * total).clamp(self.floor, 1.0).tolist()


@dataclass(frozen=True)
class Pyramid:
    """Shares fall linearly from the first layer to the last (PyramidKV, arXiv 2406.02069, section 4.2).

    The last layer keeps ``1 / steepness`` of the mean share, the first as much more than the mean as the last keeps
    less. Where the first layers cannot hold their share, the others get what is left.

    Args:
        steepness: the paper's ``beta``.
    """

    kind: ClassVar[str] = "pyramid"
    head_wise: ClassVar[bool] = False
    threshold: ClassVar[float | None] = None
    steepness: float = 20.0

    def __post_init__(self) -> None:
        checks.at_least("steepness", self.steepness, 1)

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each layer keeps."""
        last = budget / self.steepness
        weights = torch.linspace(2 * budget - last, last, len(layers), dtype=torch.float64)
        if len(layers) == 1:
            return [budget]
        return water_fill(weights, budget * len(layers), 0.0).tolist()


@dataclass(frozen=True)
class SharedMass:
    """Every layer keeps as many entries as hold the same share of its attention (PrefixKV, arXiv 2412.03409).

    A layer keeps the smallest prefix of its entries, sorted by importance and averaged over heads, whose mass reaches a
    threshold that all layers share; bisection finds the threshold whose mean share is the budget.
    """

    kind: ClassVar[str] = "shared-mass"
    head_wise: ClassVar[bool] = False
    threshold: ClassVar[float | None] = None

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each layer keeps."""
        scores = gather_to_cpu(layer.score.mean(0) for layer in layers).double().sort(-1, descending=True).values
        masses = scores.cumsum(-1) / scores.sum(-1, keepdim=True)
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(_prefixes(masses, middle)) > budget * len(masses) else (middle, high)
        return [*_prefixes(masses, low)] if budget < 1 else [1.0] * len(masses)


@dataclass(frozen=True)
class StrengthSkewness:
    """Layers that look at vision much, or sharply, keep more of it (AirCache, arXiv 2503.23956).

    Strength is a layer's importance summed over vision tokens, skewness that of its distribution over them; what leans
    to the left counts as not skewed. Each is divided by its mean over the layers, and the mean of both says how much
    more than the average share of its vision tokens a layer keeps. Every layer has room for the text.
    """

    kind: ClassVar[str] = "strength-skewness"
    head_wise: ClassVar[bool] = False
    threshold: ClassVar[float | None] = None

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each layer keeps."""
        vision = layers[0].vision
        seen = int(vision.sum())
        text = 1 - seen / len(vision)
        if not seen or budget <= text:
            return [budget] * len(layers)
        importance = gather_to_cpu(layer.score.mean(0) for layer in layers)[:, vision].double()
        weights = (relative(importance.sum(1)) + relative(skewness(importance).clamp(min=0))) / 2
        of_vision = water_fill(weights, (budget - text) / (1 - text) * len(layers), 0.0)
        return (text + (1 - text) * of_vision).tolist()


def _prefixes(masses: Tensor, threshold: float) -> list[float]:
    """Share of its entries that each layer needs for a cumulative mass ``[L, T]`` of ``threshold``."""
    if threshold == 1:
        return [1.0] * len(masses)
    return (((masses < threshold).sum(-1) + 1).double() / masses.shape[1]).tolist()


def skewness(samples: Tensor) -> Tensor:
    """Sample skewness of each row, ``[L]`` of ``[L, n]``; 0 where it has none."""
    count = samples.shape[1]
    if count < 3:
        return samples.new_zeros(len(samples))
    spread = samples.std(1, keepdim=True)
    cubes = ((samples - samples.mean(1, keepdim=True)) / spread.clamp(min=torch.finfo(samples.dtype).tiny)) ** 3
    return count / ((count - 1) * (count - 2)) * cubes.sum(1)


def relative(numbers: Tensor) -> Tensor:
    """Numbers of at least 0 divided by their mean, ``[L]``; all 1 where that is 0."""
    return numbers / numbers.mean() if numbers.any() else torch.ones_like(numbers)


def water_fill(weights: Tensor, total: float, floor: float) -> Tensor:
    """Shares in proportion to ``weights``, float64 ``[L]``, each in ``[floor, 1]``, that sum to ``total``."""
    # What weighs nothing cannot be scaled up, but it must take what is left once all others are full.
    weights = relative(weights).clamp(min=1e-9)
    # The sum of clamp(scale * weights) rises with the scale and bends only where a layer meets a bound: the scale lies
    # between two bends, and between them the sum is linear.
    bends = torch.cat([floor / weights, 1 / weights]).sort().values
    sums = (bends[:, None] * weights).clamp(floor, 1.0).sum(-1)
    above = int(torch.searchsorted(sums, total).clamp(1, len(bends) - 1))
    low, high = sums[above - 1], sums[above]
    step = ((total - low) / (high - low)).clamp(0, 1) if high > low else sums.new_zeros(())
    scale = torch.lerp(bends[above - 1], bends[above], step)
    shares = (scale * weights).clamp(floor, 1.0)
    # A layer that is full up to rounding must not drop an entry for it while decoding.
    return torch.where(shares > 1 - 1e-12, 1.0, shares)
