"""Intervals and p-values against exact ones."""

from itertools import product

import numpy as np
import pytest

from sparsight.eval.significance import FLIPS, bootstrap_interval, paired_p_value


def exact_p_value(one: np.ndarray, other: np.ndarray) -> float:
    """Of all ways to swap pairs, the share whose mean difference is at least as large."""
    differences = one - other
    signs = np.array(list(product([-1, 1], repeat=len(differences))))
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean())


@pytest.mark.parametrize("seed", range(5))
def test_the_paired_test_is_the_exact_one_up_to_chance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.random(10) + 0.2 * seed, rng.random(10)
    assert paired_p_value(one, other) == pytest.approx(exact_p_value(one, other), abs=0.02)


def test_the_paired_test_of_answers_right_or_wrong_is_mcnemars() -> None:
    # Ten pairs differ, nine in one direction: 2 (1 + 10) / 2^10 by the binomial distribution.
    one = np.array([1.0] * 9 + [0.0] + [1.0] * 20)
    other = np.array([0.0] * 9 + [1.0] + [1.0] * 20)
    assert paired_p_value(one, other) == pytest.approx(2 * 11 / 1024, abs=0.005)


def test_equal_pairs_are_not_significant_and_all_different_ones_are() -> None:
    same = np.array([1.0, 0.0, 1.0])
    assert paired_p_value(same, same) == 1
    assert paired_p_value(np.ones(100), np.zeros(100)) == 1 / (FLIPS + 1)


def test_p_values_are_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(0)
    found = [paired_p_value(rng.random(20), rng.random(20)) for _ in range(300)]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_the_interval_of_a_share_is_binomial() -> None:
    right = np.array([1.0] * 80 + [0.0] * 20)
    low, high = bootstrap_interval(right, np.ones(100))
    # Resampled, the number of right answers is binomial with n = 100, p = 0.8.
    assert low == pytest.approx(0.72, abs=0.011)
    assert high == pytest.approx(0.87, abs=0.011)
    assert bootstrap_interval(np.ones(10), np.ones(10)) == (1, 1)


def test_the_interval_covers_the_true_value_at_its_level() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        lengths = rng.integers(1, 9, 60).astype(float)
        low, high = bootstrap_interval(rng.normal(2, 1, 60) * lengths, lengths)
        held += low <= 2 <= high
    assert 0.88 < held / 200 < 0.99


def test_examples_without_weight_do_not_break_the_interval() -> None:
    low, high = bootstrap_interval(np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0]))
    assert low == high == 1
