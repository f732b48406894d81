"""Uncertainty: bootstrap intervals and a paired test, over examples."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]

RESAMPLES = 2000
FLIPS = 9999
SEED = 0


def interval(sums: Figures, weights: Figures, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of ``sum(sums) / sum(weights)`` over examples.

    Args:
        sums: a figure of each example, ``[N]``.
        weights: what it is to be divided by, ``[N]``; ones for a mean.
        level: how often the interval is to hold the true value.
    """
    counts = _resamples(len(sums))
    totals = counts @ weights
    # A resample of examples without any weight has no ratio.
    ratios = (counts @ sums)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p_value(one: Figures, other: Figures) -> float:
    """Two-sided p-value of a paired sign-flip test: that which of two methods is which does not matter.

    The mean difference is compared with its values under random swaps of each example's pair (Fisher's randomisation
    test). 1 where all pairs are equal; ``1 / (FLIPS + 1)`` at the least.

    Args:
        one: a figure of each example under one method, ``[N]``.
        other: of the same examples under another.
    """
    differences = one - other
    flipped = np.abs(_signs(len(differences)) @ differences)
    # Sums of the same numbers in another order may differ in their last bits.
    extreme = int((flipped >= abs(differences.sum()) * (1 - 1e-9) - 1e-12).sum())
    return (extreme + 1) / (FLIPS + 1)


@lru_cache(maxsize=8)
def _resamples(count: int) -> Figures:
    """How often each of ``count`` examples is in each resample, ``[RESAMPLES, count]``."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


@lru_cache(maxsize=8)
def _signs(count: int) -> Figures:
    """Random signs, ``[FLIPS, count]``."""
    rng = np.random.default_rng(SEED)
    return rng.integers(0, 2, size=(FLIPS, count)).astype(np.float64) * 2 - 1
