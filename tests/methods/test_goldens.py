"""Methods against what their authors' own functions returned (tests/goldens)."""

import numpy as np
import torch

from sparsight import recipe
from sparsight.compression.allocate import LayerStatistics
from sparsight.models.prompt import Span
from tests.goldens.test_released import cases, prompt


def statistics(chosen, case, query, key):
    """What a recipe's score says of a prompt without vision tokens."""
    query, key = torch.from_numpy(query).float(), torch.from_numpy(key).float()
    length = case["length"]
    queries = chosen.score.queries(Span(0, length, length))
    attention = chosen.score.accumulator(case["kv_heads"], Span(0, 0, length), torch.device("cpu"))
    attention.add(query[:, queries.start :], key, case["size"] ** -0.5, None, None, None)
    vision = torch.zeros(length, dtype=torch.bool)
    score = chosen.score.importance(attention.sums(key, vision), vision, [])
    return LayerStatistics(score, 0.0, vision, chosen.reduce.always(min(case["keep"], length), length))


@cases("snapkv")
def test_snapkv_keeps_the_positions_of_the_authors_code(case):
    chosen = recipe("snapkv", window=case["window"], pool=case["kernel"], pooling=case["pooling"])
    score = statistics(chosen, case, *prompt(case)).score
    kept = chosen.reduce.select(score, min(case["keep"], case["length"]))
    assert kept.tolist() == case["positions"]


@cases("adakv", lambda case: case["pooling"] == "max")
def test_adakv_shares_the_budget_as_the_authors_code_does_up_to_its_rounding(case):
    query, key = prompt(case)
    query *= (1 + 0.35 * np.arange(case["heads"]))[:, None, None] / 2
    length, keep = case["length"], min(case["keep"], case["length"])
    numbers = {"window": case["window"], "pool": case["kernel"], "floor": case["floor"], "normalize": case["normalize"]}
    chosen = recipe("adakv", budget=keep / length, **numbers)
    (shares,) = chosen.allocate.shares([statistics(chosen, case, query, key)], chosen.budget)
    counts = [round(share * length) for share in shares]
    # Each head is rounded by itself there; here the heads' sum is the budget.
    assert sum(counts) == keep * len(counts)
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(counts, case["lengths"], strict=True))
