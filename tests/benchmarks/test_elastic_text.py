"""The variants of Elastic Cache that the benchmark compares."""

import torch

from benchmarks.elastic_text import BUDGETS, MergeValues, ReleasedOrder, variants
from sparsight.compression import Evict, MergeNearest


def test_values_merge_and_keys_do_not() -> None:
    keys, values = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    reduce = MergeValues()
    positions = reduce.select(torch.rand(2, 9), 4)
    merged_keys, merged_values = reduce.apply(keys, values, positions)
    assert torch.equal(merged_keys, Evict().apply(keys, values, positions)[0])
    assert torch.equal(merged_values, MergeNearest().apply(keys, values, positions)[1])
    assert not torch.equal(merged_values, Evict().apply(keys, values, positions)[1])


def test_the_released_order_goes_by_argsort() -> None:
    sums = torch.tensor([[0.5, 0.1, 0.4, 0.2, 0.3]])
    score = ReleasedOrder().importance(sums, torch.zeros(5, dtype=torch.bool), [])
    # The positions of the scores in ascending order: the code keeps place 2, where position 4 stands, before place 1.
    assert score.tolist() == [[1, 3, 4, 2, 0]]


def test_every_variant_differs_from_elastic_at_every_budget() -> None:
    recipes = variants()
    assert len({recipe.to_json() for recipe in recipes}) == len(recipes)
    assert {recipe.budget for recipe in recipes if recipe.name == "elastic"} == set(BUDGETS)
