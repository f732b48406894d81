import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.parts import SparsityAware, Uniform
from tests import reference

SPARSITIES = st.lists(st.floats(0, 0.9999), min_size=1, max_size=40)
BUDGETS = st.floats(0.001, 1.0)


@settings(deadline=None)
@given(sparsities=SPARSITIES, budget=BUDGETS, water_fill=st.booleans())
def test_sparsity_aware_shares_equal_the_brute_force(sparsities, budget, water_fill):
    shares = SparsityAware(water_fill=water_fill).shares(torch.tensor(sparsities, dtype=torch.float64), budget)
    assert_close(shares.tolist(), reference.layer_shares(sparsities, budget, 0.01, water_fill), rtol=0, atol=1e-7)


@settings(deadline=None)
@given(sparsities=SPARSITIES, budget=BUDGETS)
def test_water_filling_meets_the_budget_and_its_bounds(sparsities, budget):
    shares = SparsityAware().shares(torch.tensor(sparsities, dtype=torch.float64), budget)
    assert_close(shares.mean().item(), budget, rtol=1e-9, atol=1e-9)
    assert shares.min() >= min(0.01, budget) - 1e-12
    assert shares.max() <= 1


def test_the_plain_clip_loses_what_a_dense_layer_cannot_hold():
    sparsity = torch.tensor([0.0, 0.99, 0.99, 0.99], dtype=torch.float64)
    clipped = SparsityAware(water_fill=False).shares(sparsity, 0.5)
    assert clipped[0] == 1
    assert clipped.mean() < 0.3
    filled = SparsityAware().shares(sparsity, 0.5)
    assert_close(filled, torch.tensor([1, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64))


def test_denser_layers_get_more():
    shares = SparsityAware().shares(torch.tensor([0.9, 0.8, 0.6], dtype=torch.float64), 0.07)
    assert_close(shares, torch.tensor([0.03, 0.06, 0.12], dtype=torch.float64))


@given(sparsities=SPARSITIES, budget=BUDGETS)
def test_uniform_ignores_sparsity(sparsities, budget):
    assert Uniform().shares(torch.tensor(sparsities), budget).tolist() == [budget] * len(sparsities)


@pytest.mark.parametrize("numbers", [{"threshold": 0}, {"threshold": 1.5}, {"floor": -0.1}, {"floor": "much"}])
def test_numbers_out_of_range_are_refused(numbers):
    name = next(iter(numbers))
    with pytest.raises(ValueError, match=f"{name} must be a number in"):
        SparsityAware(**numbers)
