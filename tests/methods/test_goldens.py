"""Methods against what their authors' own functions returned (tests/goldens)."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparsight import recipe
from sparsight.compression.allocate import LayerStatistics
from sparsight.compression.eviction import EvictionState
from sparsight.compression.score import NewQueries
from sparsight.eval.calibration import head_hits
from sparsight.models.prompt import Span
from tests.goldens.inputs import causal_rows, ranked_attention, rows, sharpened_rows, states, uniform
from tests.goldens.test_released import cases, look_m_prompt, prompt
from tests.support.released.look_m import look_m_positions
from tests.support.released.prefixkv import prefixkv_budgets


def fitted(case, name, **numbers):
    """A recipe with the budget of a golden, for its prompt."""
    length = case["length"]
    chosen = recipe(name, budget=min(case["keep"], length) / length, **numbers)
    # A golden whose window is smaller than its budget has that window here too.
    assert case["keep"] >= length or chosen.fitted(length, 0) == chosen
    return chosen.fitted(length, 0)


def statistics(chosen, case, query, key):
    """What a recipe's score says of a prompt without vision tokens."""
    query, key = torch.from_numpy(query).float(), torch.from_numpy(key).float()
    length = case["length"]
    queries = chosen.score.queries(Span(0, length, length))
    attention = chosen.score.accumulator(case["kv_heads"], Span(0, 0, length), torch.device("cpu"))
    attention.add(NewQueries(query[:, queries.start :], key, case["size"] ** -0.5))
    vision = torch.zeros(length, dtype=torch.bool)
    score = chosen.score.importance(attention.sums(key, vision), vision, [])
    return LayerStatistics(score, 0.0, vision, chosen.reduce.always(min(case["keep"], length), length))


@cases("snapkv")
def test_snapkv_keeps_the_positions_of_the_authors_code(case):
    chosen = fitted(case, "snapkv", window=case["window"], pool=case["kernel"], pooling=case["pooling"])
    score = statistics(chosen, case, *prompt(case)).score
    kept = chosen.reduce.select(score, min(case["keep"], case["length"]))
    assert kept.tolist() == case["positions"]


@cases("adakv")
def test_adakv_shares_the_budget_as_the_authors_code_does_up_to_its_rounding(case):
    numbers = {name: case[name] for name in ("window", "pooling", "floor", "normalize")}
    numbers["pool"] = case["kernel"]
    chosen, (query, key) = fitted(case, "adakv", **numbers), prompt(case)
    query *= (1 + 0.35 * np.arange(case["heads"]))[:, None, None] / 2
    length, keep = case["length"], min(case["keep"], case["length"])
    layer = statistics(chosen, case, query, key)
    (shares,) = chosen.allocate.shares([layer], chosen.budget)
    counts = [round(share * length) for share in shares]
    # Each head is rounded by itself there; here the heads' sum is the budget.
    assert sum(counts) == keep * len(counts)
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(counts, case["lengths"], strict=True))
    for head, (count, positions) in enumerate(zip(case["lengths"], case["positions"], strict=True)):
        assert chosen.reduce.select(layer.score[head : head + 1], count).tolist() == [positions]


def shares_of(case, layers, **numbers):
    """A recipe's allocation at the budget of a golden, times the prompt's length."""
    length, keep = case["length"], min(case["keep"], case["length"])
    chosen = fitted(case, **numbers)
    always, vision = chosen.reduce.always(keep, length), torch.zeros(length, dtype=torch.bool)
    one = LayerStatistics(torch.ones(case["kv_heads"], length), 0.0, vision, always)
    shares = torch.tensor(chosen.allocate.shares([one] * layers, chosen.budget), dtype=torch.float64)
    return (shares * length).tolist()


@cases("pyramidkv", lambda case: case["above_half"] == "uniform")
def test_pyramidkv_shares_the_budget_as_the_authors_code_does_up_to_its_rounding(case):
    layers = case["layers"]
    shares = shares_of(case, layers, name="pyramidkv", window=case["window"], steepness=case["beta"])
    assert sum(shares) == pytest.approx(layers * min(case["keep"], case["length"]))
    # There the first and the last budget are integers, and so is the step between layers, rounded down.
    first, last = math.ceil(round(shares[0], 6)), math.floor(round(shares[-1], 6))
    step = (first - last) // (layers - 1)
    assert case["budgets"] == [first - layer * step for layer in range(layers)]


@cases("pyramidkv", lambda case: "first_layer" in case)
def test_pyramidkv_keeps_the_positions_of_the_authors_code(case):
    chosen = fitted(case, "pyramidkv", window=case["window"])
    score = statistics(chosen, case, *prompt(case)).score
    for budget, positions in ((case["budgets"][0], case["first_layer"]), (case["budgets"][-1], case["last_layer"])):
        assert chosen.reduce.select(score, budget).tolist() == positions


@cases("streaming_llm")
def test_streaming_llm_keeps_the_positions_of_the_authors_code(case):
    chosen = recipe("streaming-llm", sinks=case["sinks"])
    score = chosen.score.importance(torch.zeros(2, case["length"]), None, [])
    assert chosen.reduce.select(score, case["keep"]).tolist() == [case["positions"]] * 2


def sparsemm_shares(case):
    """Entries of each KV head, ``[L, H_kv]``."""
    return np.array(shares_of(case, case["layers"], name="sparsemm", **sparsemm_numbers(case)))


def sparsemm_numbers(case):
    by_query_head = (uniform(case["seed"] + 50, case["layers"], case["heads"], 6) ** 6).mean(-1)
    heads = by_query_head.reshape(case["layers"], case["kv_heads"], -1).mean(-1).tolist()
    pooling = {"pool": case["kernel"], "pooling": case["pooling"]}
    return {"heads": heads, "window": case["window"], "equal": case["ratio"], **pooling}


@cases("sparsemm", lambda case: "budgets" in case and np.max(case["budgets"]) <= case["length"])
def test_sparsemm_shares_the_budget_as_the_authors_code_does_up_to_its_rounding(case):
    shares, rest = sparsemm_shares(case) - case["window"], case["keep"] - case["window"]
    assert shares.mean() == pytest.approx(rest)
    # There the equal part is rounded down, and each head.
    least = int(rest * case["ratio"])
    by_score = (shares - case["ratio"] * rest) / ((1 - case["ratio"]) * rest)
    assert (np.rint(by_score * (rest - least) + least) + case["window"]).tolist() == case["budgets"]


@cases("sparsemm", lambda case: "budgets" in case and np.max(case["budgets"]) > case["length"])
def test_what_a_sparsemm_head_cannot_hold_goes_to_the_others(case):
    shares, length = sparsemm_shares(case), case["length"]
    assert shares.mean() == pytest.approx(min(case["keep"], length))
    assert shares[np.array(case["budgets"]) > length].min() == pytest.approx(length)
    assert shares.max() == pytest.approx(length)


@cases("sparsemm", lambda case: "budgets" in case)
def test_sparsemm_keeps_the_positions_of_the_authors_code(case):
    chosen = fitted(case, "sparsemm", **sparsemm_numbers(case))
    score = statistics(chosen, case, *prompt(case)).score
    for head, (count, positions) in enumerate(zip(case["lengths"][0], case["first_layer"], strict=True)):
        assert chosen.reduce.select(score[head : head + 1], count).tolist() == [positions]


@cases("sparsemm", lambda case: "scores" in case)
def test_heads_are_scored_by_the_hits_of_the_authors_code(case):
    regions = [set(range(3 * t, 4 * t + 6)) for t in range(case["tokens"])]
    total = 0
    for image in range(case["images"]):
        attention = [rows(10 * image + t, case["layers"], case["heads"], case["keys"]) for t in range(case["tokens"])]
        by_layer = torch.from_numpy(np.stack(attention, axis=2))
        total += torch.stack([head_hits(layer, regions) for layer in by_layer])
    assert_close(total / case["images"], torch.tensor(case["scores"]))


def importance(attention):
    """Attention `[H, T, T]` accumulated over the queries, float32 `[H, T]`."""
    return torch.from_numpy(attention.sum(1)).float()


@cases("elastic")
def test_elastic_merges_as_the_authors_code_does(case):
    shape = (case["layers"], case["heads"], case["length"], case["size"])
    attention = ranked_attention(case["seed"], *shape[:3], case["start_size"])
    keys, values = (states(case["seed"] + n, shape[0] * shape[1], *shape[2:]).reshape(shape) for n in (500, 900))
    part = recipe("elastic", protect_first=case["start_size"]).reduce
    for layer in range(case["layers"]):
        positions = part.select(importance(attention[layer]), case["kept"])
        assert positions.tolist() == [case["positions"][layer]] * case["heads"]
        own = [torch.from_numpy(each[layer]).float() for each in (keys, values)]
        for before, merged, name in zip(own, part.apply(*own, positions), ("keys", "values"), strict=True):
            assert torch.equal(merged[:, -1], before[:, -1])
            assert torch.equal(merged[:, : case["start_size"]], before[:, : case["start_size"]])
            if name in case:
                assert_close(merged.flatten(), torch.tensor(case[name][layer]), rtol=1e-5, atol=1e-6)


@cases("elastic", lambda case: "point" in case)
def test_elastic_decodes_as_the_authors_code_does(case):
    # They count the distance from one entry more than they keep.
    rule = recipe("elastic", distance=24).decode
    history = list(decoded(rule, case["positions"][0], 1 - case["drop_ratio"], case["length"], len(case["entries"])))
    assert [len(held) for held in history] == case["entries"]
    assert history[-1] == case["last"]


@cases("prefixkv")
def test_prefixkv_shares_the_budget_by_the_paper_and_near_the_authors_profile(case):
    attention = sharpened_rows(case["seed"], case["layers"], case["heads"], case["length"])
    none = torch.zeros(case["length"], dtype=torch.bool)
    layers = [LayerStatistics(importance(layer), 0.0, none, none) for layer in attention]
    shares = recipe("prefixkv").allocate.shares(layers, 1 - case["drop_ratio"])
    counts = [round(share * case["length"]) for share in shares]
    total = int((1 - case["drop_ratio"]) * case["length"] * case["layers"])
    assert counts == prefixkv_budgets(attention.sum(-2).mean(1), total)
    # Their profile grants the protected entries on top and scales what its bisection leaves over.
    assert all(abs(ours - theirs) <= 4 for ours, theirs in zip(counts, case["kept"], strict=True))


@cases("prefixkv")
def test_prefixkv_keeps_and_drops_the_positions_of_the_authors_code(case):
    chosen = recipe("prefixkv")
    attention = sharpened_rows(case["seed"], case["layers"], case["heads"], case["length"])
    for layer, kept in enumerate(case["kept"]):
        positions = chosen.reduce.select(importance(attention[layer]), kept)
        assert positions.tolist() == [case["positions"][layer]] * case["heads"]
        ratio = kept / case["length"]
        history = list(decoded(chosen.decode, positions[0].tolist(), ratio, case["length"], case["steps"]))
        assert [len(held) for held in history] == [entries[layer] for entries in case["entries"]]
        assert history[-1] == case["last"][layer]


@cases("look_m")
def test_look_m_keeps_the_positions_of_the_authors_code_as_far_as_text_fits(case):
    attention, _, _, text = look_m_prompt(case)
    kept = case["heavy"] + case["recent"]
    chosen = recipe("look-m", recent=case["recent"] / kept)
    score = chosen.score.importance(importance(attention), ~torch.from_numpy(text), [])
    positions = chosen.reduce.select(score, kept).tolist()
    expected = case["positions"]
    if len(expected[0]) > kept:
        expected = look_m_positions(attention, text, case["heavy"], case["recent"], case["heads"])
    assert positions == expected


@cases("look_m", lambda case: "pivotal" in case)
def test_look_m_merges_as_the_authors_code_does(case):
    check_look_m_merge(case, "pivotal")


@pytest.mark.parametrize("merge", ["averaged", "weighted"])
@cases("look_m", lambda case: "averaged" in case)
def test_look_m_merges_the_other_ways_as_the_authors_code_does_where_its_filter_passes_everything(case, merge):
    check_look_m_merge(case, merge)


def check_look_m_merge(case, merge):
    _, keys, values, _ = look_m_prompt(case)
    part, states = recipe("look-m", merge=merge).reduce, [torch.from_numpy(each).float() for each in (keys, values)]
    # The released code keeps all text, so its heads may keep different numbers of entries.
    heads = []
    for head, kept in enumerate(case["positions"]):
        own = [each[head : head + 1] for each in states]
        heads.append([each[0] for each in part.apply(*own, torch.tensor([kept]))])
    for merged, expected in zip(zip(*heads, strict=True), case[merge], strict=True):
        projected = torch.cat(merged).double() @ torch.from_numpy(uniform(77, 128) - 0.5)
        assert_close(projected, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@cases("h2o")
def test_h2o_holds_the_positions_of_the_authors_code_after_each_step(case):
    heads, length, most, recent = (case[name] for name in ("heads", "length", "heavy", "recent"))
    most += recent
    score = importance(causal_rows(case["seed"], heads, length, length))
    kept = recipe("h2o", recent=recent / most).reduce.select(score, min(length, most))
    assert kept.tolist() == case["history"][0]
    # There a new token attends before an entry leaves, so that one more is held meanwhile.
    rule = recipe("h2o", recent=recent / (most + 1)).decode
    slots = Slots(torch.full((heads, most + 1), -1, dtype=torch.int32))
    slots.positions[:, : kept.shape[1]] = kept
    zero = torch.zeros(heads, dtype=torch.float64)
    state = EvictionState(zero, zero, zero + most + 1, zero.long(), zero.int(), torch.zeros(heads, most + 1))
    state.scores[:, : kept.shape[1]] = score.gather(1, kept)
    rule.protect(slots, state, length)
    for step, expected in enumerate(case["history"]):
        taken = rule.slots(slots, state, rule.grows(slots.held, state, zero + length + step + 1))
        slots.positions.scatter_(1, taken[:, None], length + step)
        held = slots.entries()
        assert [head[:-1] for head in held] == expected
        state.scores.scatter_(1, taken[:, None], 0)
        attention = torch.from_numpy(rows(1000 + step, heads, len(held[0]))).float()
        by_position = slots.positions.masked_fill(slots.positions < 0, length + step + 1).argsort(-1)
        state.scores.scatter_add_(1, by_position[:, : len(held[0])], attention)


@dataclass
class Slots:
    """The positions in the slots of KV heads, -1 where a slot is vacant."""

    positions: Tensor

    @property
    def held(self):
        return (self.positions >= 0).sum(-1)

    @property
    def used(self):
        return self.held

    def entries(self):
        """Positions of each head, ascending."""
        return [sorted(position for position in head if position >= 0) for head in self.positions.tolist()]


def decoded(rule, kept, ratio, length, steps):
    """Positions held after each token of an answer, by a rule that may hold ``ratio`` of the tokens seen."""
    slots = Slots(torch.full((1, len(kept) + steps), -1, dtype=torch.int32))
    slots.positions[0, : len(kept)] = torch.tensor(kept)
    zero = torch.zeros(1, dtype=torch.float64)
    state = EvictionState(zero + ratio, zero, zero, zero.long(), zero.int(), torch.zeros(1, 0))
    rule.protect(slots, state, length)
    for position in range(length, length + steps):
        taken = rule.slots(slots, state, rule.grows(slots.held, state, zero + position + 1))
        slots.positions[0, taken] = position
        yield slots.entries()[0]
