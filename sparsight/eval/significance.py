"""Uncertainty over examples: bootstrap intervals and a paired randomization test."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
FLIPS = 9999
SEED = 0


def bootstrap_interval(sums: FloatArray, weights: FloatArray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of ``sum(sums) / sum(weights)`` over examples.

    Args:
        sums: numerator of each example, ``[N]``.
        weights: denominator of each example, ``[N]``; ones for a mean.
        level: confidence level.
    """
    counts = _resamples(len(sums))
    totals = counts @ weights
    # A resample in which all weights are 0 has no ratio.
    ratios = (counts @ sums)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p_value(one: FloatArray, other: FloatArray) -> float:
    """Two-sided p-value of a paired sign-flip test (Fisher's randomization test) of equal means.

    The mean difference is compared with the mean differences after random swaps within pairs. The result is 1 if all
    pairs are equal, and at least ``1 / (FLIPS + 1)``.

    Args:
        one: metric of each example with one method, ``[N]``.
        other: metric of the same examples with the other method, ``[N]``.
    """
    differences = one - other
    flipped = np.abs(_signs(len(differences)) @ differences)
    # Sums of the same numbers in another order may differ in their last bits.
    extreme = int((flipped >= abs(differences.sum()) * (1 - 1e-9) - 1e-12).sum())
    return (extreme + 1) / (FLIPS + 1)


@lru_cache(maxsize=8)
def _resamples(count: int) -> FloatArray:
    """How often each of ``count`` examples is in each resample, ``[RESAMPLES, count]``."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


@lru_cache(maxsize=8)
def _signs(count: int) -> FloatArray:
    """Random signs, ``[FLIPS, count]``."""
    rng = np.random.default_rng(SEED)
    return rng.integers(0, 2, size=(FLIPS, count)).astype(np.float64) * 2 - 1
