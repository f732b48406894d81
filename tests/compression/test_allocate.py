from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import Pyramid, SharedMass, SparsityAware, Uniform
from sparsight.compression.allocate import LayerStatistics
from tests.support import reference
from tests.support.released.prefixkv import prefixkv_budgets


def scored(*scores, vision=(), always=()):
    """Layers of these scores ``[H_kv, T]``, with positions of vision tokens and some that always stay."""
    places = torch.arange(scores[0].shape[1])
    seen, stay = torch.isin(places, torch.tensor(vision)), torch.isin(places, torch.tensor(always))
    return [LayerStatistics(score, 0.0, seen, stay) for score in scores]


def sparse(*sparsities, window=0, length=4):
    """Layers of these sparsities, whose last entries always stay."""
    nothing, always = torch.zeros(length, dtype=torch.bool), torch.arange(length) >= length - window
    return [LayerStatistics(torch.ones(1, 4), sparsity, nothing, always) for sparsity in sparsities]


SPARSITIES = st.lists(st.floats(0, 0.9999), min_size=1, max_size=40)
BUDGETS = st.floats(0.001, 1.0)


@settings(deadline=None)
@given(sparsities=SPARSITIES, budget=BUDGETS, water_fill=st.booleans())
def test_sparsity_aware_shares_equal_the_brute_force(sparsities, budget, water_fill):
    shares = SparsityAware(water_fill=water_fill).shares(sparse(*sparsities), budget)
    assert_close(shares, reference.layer_shares(sparsities, budget, 0.01, water_fill), rtol=0, atol=1e-7)


@settings(deadline=None)
@given(sparsities=SPARSITIES, budget=BUDGETS)
def test_water_filling_meets_the_budget_and_its_bounds(sparsities, budget):
    shares = SparsityAware().shares(sparse(*sparsities), budget)
    assert_close(fmean(shares), budget, rtol=1e-9, atol=1e-9)
    assert min(shares) >= min(0.01, budget) - 1e-12
    assert max(shares) <= 1


def test_the_plain_clip_loses_what_a_dense_layer_cannot_hold():
    layers = sparse(0.0, 0.99, 0.99, 0.99)
    clipped = SparsityAware(water_fill=False).shares(layers, 0.5)
    assert clipped[0] == 1
    assert fmean(clipped) < 0.3
    assert_close(SparsityAware().shares(layers, 0.5), [1.0, 1 / 3, 1 / 3, 1 / 3])


def test_denser_layers_get_more():
    assert_close(SparsityAware().shares(sparse(0.9, 0.8, 0.6), 0.07), [0.03, 0.06, 0.12])


@given(sparsities=SPARSITIES, budget=BUDGETS)
def test_uniform_ignores_sparsity(sparsities, budget):
    assert Uniform().shares(sparse(*sparsities), budget) == [budget] * len(sparsities)


@settings(deadline=None)
@given(layers=st.integers(1, 40), budget=BUDGETS, steepness=st.floats(1, 50), window=st.integers(0, 50))
def test_pyramid_shares_equal_the_brute_force(layers, budget, steepness, window):
    shares = Pyramid(steepness=steepness).shares(sparse(*[0.5] * layers, window=window, length=50), budget)
    keep = 50 * budget
    expected = reference.pyramid_budgets(layers, keep, 50, min(window, keep), steepness)
    assert_close(shares, [budget / 50 for budget in expected], rtol=0, atol=1e-9)
    assert_close(fmean(shares), budget, rtol=1e-7, atol=0)
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= min(window, keep) / 50 - 1e-12
    assert max(shares) <= 1 + 1e-12


def test_the_last_layer_of_a_pyramid_keeps_the_window_and_a_twentieth_of_the_mean_rest():
    assert_close(Pyramid().shares(sparse(0, 0, 0), 0.1), [0.195, 0.1, 0.005])
    assert_close(Pyramid().shares(sparse(0, 0, 0, window=10, length=100), 0.3), [0.49, 0.3, 0.11])


def test_a_pyramid_whose_first_layer_is_full_raises_the_last_and_above_half_is_flat():
    assert_close(Pyramid().shares(sparse(0, 0, 0, window=10, length=100), 0.57), [1.0, 0.57, 0.14])
    assert_close(Pyramid().shares(sparse(0, 0, 0, window=10, length=100), 0.7), [0.7, 0.7, 0.7])


@settings(deadline=None)
@given(
    scores=st.lists(st.lists(st.floats(2**-7, 10, width=32), min_size=6, max_size=6), min_size=1, max_size=5),
    budget=st.floats(0.01, 0.999),
)
def test_shared_mass_equals_the_brute_force_and_fits_the_budget(scores, budget):
    layers = scored(*[torch.tensor([score, score]) for score in scores])
    shares = SharedMass().shares(layers, budget)
    assert fmean(shares) <= max(budget, 1 / 6) + 1e-9
    # Masses that tie up to rounding may fall on either side of the threshold.
    total = max(int(budget * 6 * len(scores)), len(scores))
    assert 6 * sum(shares) >= sum(prefixkv_budgets(np.array(scores), total)) - 1e-9


def test_layers_whose_attention_is_spread_keep_more_of_it():
    peaked, spread = torch.tensor([[8.0, 1, 1, 0, 0, 0]]), torch.ones(1, 6)
    assert_close(SharedMass().shares(scored(peaked, spread), 0.5), [1 / 6, 5 / 6])
    assert SharedMass().shares(scored(peaked, spread), 1.0) == [1, 1]


@pytest.mark.parametrize("numbers", [{"threshold": 0}, {"threshold": 1.5}, {"floor": -0.1}, {"floor": "much"}])
def test_numbers_out_of_range_are_refused(numbers):
    name = next(iter(numbers))
    with pytest.raises(ValueError, match=f"{name} must be a number in"):
        SparsityAware(**numbers)
    with pytest.raises(ValueError, match="steepness must be a number of at least 1"):
        Pyramid(steepness=0.5)
