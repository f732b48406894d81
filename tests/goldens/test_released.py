"""The brute-force methods of tests/support/released against what the authors' functions returned (README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.goldens.inputs import axis_keys, causal_rows, ranked_attention, rows, sharpened_rows, states, uniform
from tests.support.released import (
    adakv,
    bacon,
    elastic,
    expected_attention,
    h2o,
    infinipot_v,
    kvzip,
    look_m,
    mixkv,
    prefixkv,
    pyramidkv,
    snapkv,
    sparsemm,
    streaming_llm,
    tgv_kv,
    vl_cache,
)
from tests.support.released.common import causal_attention, largest, window_scores


def cases(method, keep=lambda case: True):
    golden = json.loads((Path(__file__).parent / f"{method}.json").read_text())
    return pytest.mark.parametrize("case", [case for case in golden["cases"] if keep(case)])


def prompt(case):
    queries = states(case["seed"], case["heads"], case["length"], case["size"], 3)
    return queries, states(case["seed"] + 500, case["kv_heads"], case["length"], case["size"], 3)


@cases("snapkv")
def test_snapkv_keeps_the_released_positions(case):
    kept = snapkv.snapkv(
        causal_attention(*prompt(case)), *(case[k] for k in ("keep", "kv_heads", "window", "kernel", "pooling"))
    )
    assert kept == case["positions"]


@cases("pyramidkv")
def test_pyramidkv_gives_the_released_budgets(case):
    arguments = (case[k] for k in ("layers", "keep", "length", "window", "beta", "above_half"))
    assert pyramidkv.pyramidkv_budgets(*arguments) == case["budgets"]


@cases("pyramidkv", lambda case: "first_layer" in case)
def test_pyramidkv_keeps_the_released_positions(case):
    attention = causal_attention(*prompt(case))
    for budget, positions in ((case["budgets"][0], case["first_layer"]), (case["budgets"][-1], case["last_layer"])):
        assert snapkv.snapkv(attention, budget, case["kv_heads"], case["window"]) == positions


def test_pyramidkv_budgets_exceed_the_shares_of_the_paper_by_the_rounding_of_the_step_only():
    shares = pyramidkv.pyramidkv_shares(32, 48)
    budgets = pyramidkv.pyramidkv_budgets(32, 48, 1000)
    assert np.mean(shares) == pytest.approx(48)
    assert shares[-1] == pytest.approx(8 + 40 / 20)
    assert 0 < sum(budgets) - 32 * 48 < 32 * 31 / 2
    assert budgets[0] == pytest.approx(shares[0])


@cases("adakv")
def test_adakv_gives_the_released_budgets_and_positions(case):
    queries, keys = prompt(case)
    queries *= (1 + 0.35 * np.arange(case["heads"]))[:, None, None] / 2
    options = (case[k] for k in ("keep", "kv_heads", "window", "kernel", "pooling", "floor", "normalize"))
    kept = adakv.adakv(causal_attention(queries, keys), *options)
    assert [len(head) for head in kept] == case["lengths"]
    assert kept == case["positions"]


@cases("h2o")
def test_h2o_holds_the_released_positions_after_each_step(case):
    heads, length, most = case["heads"], case["length"], case["heavy"] + case["recent"]
    held = min(length, most)
    decoded = []
    for step in range(case["steps"]):
        decoded.append(rows(1000 + step, heads, held + 1))
        held = min(held + 1, most)
    attention = causal_rows(case["seed"], heads, length, length)
    assert h2o.h2o(attention, decoded, case["heavy"], case["recent"], heads) == case["history"]


@cases("streaming_llm")
def test_streaming_llm_keeps_the_released_positions(case):
    assert streaming_llm.streaming_llm(case["length"], case["keep"], case["sinks"]) == case["positions"]


@cases("elastic")
def test_elastic_keeps_the_released_anchors_and_leaves_protected_entries_untouched(case):
    shape = (case["layers"], case["heads"], case["length"], case["size"])
    attention = ranked_attention(case["seed"], *shape[:3], case["start_size"])
    keys, values = (states(case["seed"] + n, shape[0] * shape[1], *shape[2:]).reshape(shape) for n in (500, 900))
    for layer in range(case["layers"]):
        positions, merged_keys, merged_values = elastic.elastic_prefill(
            attention[layer], keys[layer], values[layer], case["kept"], case["start_size"]
        )
        assert positions == case["positions"][layer]
        np.testing.assert_array_equal(merged_keys[:, -1], keys[layer][:, -1])
        if case["start_size"]:
            assert case["protected_untouched"][layer]
            np.testing.assert_array_equal(merged_values[:, 0], values[layer][:, 0])
        else:
            np.testing.assert_allclose(merged_keys.ravel(), case["keys"][layer], rtol=1e-8)
            np.testing.assert_allclose(merged_values.ravel(), case["values"][layer], rtol=1e-8)


@cases("elastic", lambda case: "point" in case)
def test_elastic_decodes_with_the_released_allowance_and_fixed_point(case):
    assert case["point"] == elastic.elastic_point(case["kept"] + 1)
    seen = range(case["length"] + 1, case["length"] + 1 + len(case["entries"]))
    allowances = [elastic.allowance(1 - case["drop_ratio"], n) for n in seen]
    history = elastic.drop_at_point(case["positions"][0], allowances, case["length"], case["point"])
    assert [len(held) for held in history] == case["entries"]
    assert history[-1] == case["last"]


@cases("prefixkv")
def test_prefixkv_gives_the_released_profile_positions_and_decoding(case):
    layers, length = case["layers"], case["length"]
    scores = sharpened_rows(case["seed"], layers, case["heads"], length).sum(-2).mean(1)
    kept = prefixkv.prefixkv_profile(scores, case["drop_ratio"])
    assert kept == case["kept"]
    for layer in range(layers):
        positions = prefixkv.prefixkv_positions(scores[layer], kept[layer])
        assert positions == case["positions"][layer]
        point = prefixkv.prefixkv_point(kept[layer])
        assert point == case["points"][layer]
        seen = range(length + 1, length + 1 + case["steps"])
        allowances = [elastic.allowance(kept[layer] / length, n) for n in seen]
        history = elastic.drop_at_point(positions, allowances, length, point)
        assert [len(held) for held in history] == [entries[layer] for entries in case["entries"]]
        assert history[-1] == case["last"][layer]


@cases("prefixkv")
def test_prefixkv_by_the_paper_meets_the_budget_and_lies_near_the_released_profile(case):
    scores = sharpened_rows(case["seed"], case["layers"], case["heads"], case["length"]).sum(-2).mean(1)
    total = round((1 - case["drop_ratio"]) * scores.size)
    budgets = prefixkv.prefixkv_budgets(scores, total)
    assert total - case["layers"] < sum(budgets) <= total
    # The profile grants the protected entries on top and scales what its bisection leaves over.
    assert np.abs(np.array(budgets) - case["kept"]).max() <= 4


def look_m_prompt(case):
    heads, length = case["heads"], case["length"]
    attention = causal_rows(case["seed"], heads, length, length)
    random = case["keys"] == "random"
    keys = states(case["seed"] + 500, heads, length, 128) if random else axis_keys(case["seed"], heads, length)
    text = np.array([not case["image"] <= j < case["image"] + 576 for j in range(length)])
    return attention, keys, states(case["seed"] + 900, heads, length, 128), text


@cases("look_m")
def test_look_m_keeps_the_released_positions(case):
    attention, _, _, text = look_m_prompt(case)
    arguments = (attention, text, case["heavy"], case["recent"], case["heads"])
    assert look_m.look_m_positions(*arguments, cap_text=False) == case["positions"]
    capped = look_m.look_m_positions(*arguments)
    assert {len(head) for head in capped} == {case["heavy"] + case["recent"]}
    assert all(set(head) <= set(released) for head, released in zip(capped, case["positions"], strict=True))


@pytest.mark.parametrize("merge", ["pivotal", "weighted"])
@cases("look_m", lambda case: "pivotal" in case)
def test_look_m_merges_as_released(case, merge):
    check_look_m_merge(case, merge)


@cases("look_m", lambda case: "averaged" in case)
def test_look_m_averages_as_released_where_the_released_filter_passes_everything(case):
    check_look_m_merge(case, "averaged")


def check_look_m_merge(case, merge):
    _, keys, values, _ = look_m_prompt(case)
    merged = look_m.look_m_merge(keys, values, case["positions"], merge, filtered=merge == "weighted")
    for heads, golden in zip(merged, case[merge], strict=True):
        projected = np.concatenate(heads) @ (uniform(77, 128) - 0.5)
        np.testing.assert_allclose(projected, golden, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("merge", "key", "value"),
    [
        ("averaged", (1 + 2 + 3) / 3, (3 + 4 + 5) / 3),
        ("pivotal", (1 + 1.5 + 2) / 3, (3 + 3.5 + 4) / 3),
        ("weighted", (1 + 2 + 0.6 * 3) / 3, (3 + 4 + 0.6 * 5) / 3),
    ],
)
def test_look_m_merges_as_in_its_equations(merge, key, value):
    # The two evicted keys, (2, 0) and (3, 4), have the cosines 1 and 0.6 with the first kept key, less with the second.
    keys = np.array([[[1.0, 0.0], [2.0, 0.0], [3.0, 4.0], [0.0, -1.0]]])
    values = np.array([[[3.0], [4.0], [5.0], [7.0]]])
    [merged_keys], [merged_values] = look_m.look_m_merge(keys, values, [[0, 3]], merge)
    assert merged_keys[0, 0] == pytest.approx(key)
    assert merged_values[0, 0] == pytest.approx(value)
    assert merged_keys[1].tolist() == [0.0, -1.0]
    assert merged_values[1, 0] == 7.0


@cases("mixkv")
def test_mixkv_ranks_as_released(case):
    seed, kv_heads, length, size = (case[k] for k in ("seed", "kv_heads", "length", "size"))
    queries, keys = prompt(case)
    keys += 1.5 * states(seed + 700, kv_heads, 1, size)
    values = states(seed + 900, kv_heads, length, size) * (0.2 + uniform(seed + 950, kv_heads, length, 1))
    redundancy = case["redundancy"] if case["fixed"] else mixkv.mixkv_redundancy(keys)
    np.testing.assert_allclose(redundancy, case["redundancy"], rtol=1e-12)
    options = (case["keep"], case["window"], case["kernel"], "average", redundancy)
    window = list(range(length - case["window"], length))
    kept = mixkv.mixkv(queries, keys, values, *options)
    assert kept == [sorted(head) + window for head in case["ranked"]]
    scores = window_scores(causal_attention(queries, keys), case["window"], case["kernel"], "average", kv_heads)
    ranked = np.argsort(-mixkv.mixkv_scores(scores, keys, values, redundancy))
    assert ranked[:, : case["keep"] - case["window"]].tolist() == case["ranked"]


@cases("bacon")
def test_bacon_gives_the_released_scores(case):
    heads, length = case["heads"], case["length"]
    options = (case["window"], case["kernel"], case["pooling"], case["kv_heads"])
    layers = [
        bacon.bacon_inputs(causal_rows(case["seed"] + layer, heads, length, length), *options)
        for layer in range(case["layers"])
    ]
    base, last = (np.stack(scores) for scores in zip(*layers, strict=True))
    np.testing.assert_allclose(bacon.bacon_scores(base, last, case["capacity"]), case["scores"], rtol=1e-9)


def test_bacon_without_evidence_leaves_the_scores():
    base = np.array([[[0.3, 0.2, 0.1]]])
    assert bacon.bacon_scores(base, base, 1).tolist() == base.tolist()


def picture_prompt(case):
    first, end = case["picture"]
    heads, length, seed = case["heads"], case["length"], case["seed"]
    attentions = []
    for layer in range(case["layers"]):
        weights = causal_rows(seed + layer, heads, length, length)
        weights[:, end:, first:end] *= uniform(seed + 90 + layer, heads, 1, 1) ** layer
        attentions.append(weights / weights.sum(-1, keepdims=True))
    return attentions, np.array([first <= j < end for j in range(length)])


@cases("tgv_kv")
def test_tgv_kv_gives_the_released_shares_and_positions(case):
    attentions, vision = picture_prompt(case)
    shares = tgv_kv.tgv_kv_shares(attentions, vision)
    np.testing.assert_allclose(shares, case["shares"], rtol=1e-12)
    scores = [tgv_kv.tgv_kv_scores(attention, vision) for attention in attentions]
    np.testing.assert_allclose(scores[-1], case["scores"], atol=1e-11)
    budgets = tgv_kv.tgv_kv_budgets(shares, case["ratio"], case["length"])
    assert [tgv_kv.tgv_kv_positions(*layer) for layer in zip(scores, budgets, strict=True)] == case["positions"]


@cases("tgv_kv")
def test_tgv_kv_drops_the_released_entries_in_decoding(case):
    _, vision = picture_prompt(case)
    for layer, (kept, history) in enumerate(zip(case["positions"], case["history"], strict=True)):
        entries = [len(held) + 1 for held in [kept, *history[:-1]]]
        seed = case["seed"] + 1000 * (layer + 1)
        decoded = [rows(seed + step, case["heads"], count) for step, count in enumerate(entries)]
        arguments = (kept, decoded, vision, case["shares"][layer], case["ratio"], case["layers"])
        assert tgv_kv.tgv_kv_decode(*arguments) == history


def test_tgv_kv_protects_a_suffix_or_the_text_after_the_picture():
    vision = np.array([True] * 6 + [False] * 2)
    least = [[[9, 9, 9, 9, 8, 7, 6, 5, 4]], [[9, 9, 9, 9, 8, 6, 5, 4, 3]]]
    arguments = ([*range(8)], np.array(least), vision, 1.0, 0.1, 1)
    assert tgv_kv.tgv_kv_decode(*arguments) == [[0, 1, 2, 3, 4, 5, 7, 8], [0, 1, 2, 3, 4, 5, 8, 9]]
    assert tgv_kv.tgv_kv_decode(*arguments, protect="text") == [[0, 1, 2, 3, 4, 6, 7, 8], [0, 1, 2, 3, 4, 6, 7, 9]]


@cases("expected_attention")
def test_expected_attention_gives_the_released_scores(case):
    heads, kv_heads, length, size = (case[k] for k in ("heads", "kv_heads", "length", "size"))
    queries, keys = prompt(case)
    queries += states(case["seed"] + 300, heads, 1, size)
    values = states(case["seed"] + 900, kv_heads, length, size)
    frequencies = 10000.0 ** (-2 * np.arange(size // 2) / size)
    options = {name: case[name] for name in ("future", "sinks", "epsilon", "covariance")}
    scores = expected_attention.expected_attention_scores(queries, keys, values, frequencies, **options)
    sinks = case["sinks"]
    np.testing.assert_allclose(scores[:, sinks:], np.array(case["scores"])[:, sinks:], rtol=1e-10)
    assert np.isinf(scores[:, :sinks]).all()


def test_expected_attention_of_equal_queries_is_the_attention_of_that_query_at_the_next_position():
    # Rotated by a quarter turn, (1, 0) becomes (0, 1): the second key wins.
    queries, values = np.tile([1.0, 0.0], (1, 3, 1)), np.ones((1, 3, 1))
    keys = np.array([[[5.0, 5.0], [1.0, 0.0], [0.0, 1.0]]])
    frequencies, numbers = np.array([np.pi / 2]), {"future": 1, "sinks": 1}
    scores = expected_attention.expected_attention_scores(queries, keys, values, frequencies, 1, **numbers)
    weight = np.exp(1 / np.sqrt(2))
    assert scores[0, 1:].tolist() == pytest.approx([1 / (1 + weight), weight / (1 + weight)])


@cases("kvzip")
def test_kvzip_gives_the_released_scores_and_positions(case):
    heads, kv_heads, length, size, first = (case[k] for k in ("heads", "kv_heads", "length", "size", "first"))
    scores = []
    for layer in range(case["layers"]):
        seed, scale = case["seed"] + 10 * layer, 2 + layer
        replays = []
        for i, (start, end) in enumerate(kvzip.kvzip_chunks(first, length, case["chunk"])):
            tokens = case["prompt"] + end - start
            queries = states(seed + 100 * i, heads, tokens, size, scale)
            replays.append((start, end, queries, states(seed + 100 * i + 5000, kv_heads, tokens, size, scale)))
        scores.append(kvzip.kvzip_scores(replays, states(seed + 500, kv_heads, length, size, scale), first))
    scores = np.stack(scores)
    np.testing.assert_allclose(scores[..., first:], case["scores"], rtol=1e-10)
    assert [kvzip.kvzip_positions(scores, ratio) for ratio in case["ratios"]] == case["positions"]


def test_kvzip_keeps_one_pair_less_than_the_ratio_says_beside_the_system_prompt():
    scores = np.array([[[np.inf, 0.1, 0.9, 0.5], [np.inf, 0.4, 0.2, 0.3]]])
    assert kvzip.kvzip_positions(scores, 0.5) == [[[0, 2, 3], [0]]]


@cases("infinipot_v")
def test_infinipot_v_keeps_the_released_positions(case):
    seed, kv_heads, frames, size = (case[k] for k in ("seed", "kv_heads", "frames", "size"))
    grid = (case["height"], case["width"])
    frame = grid[0] * grid[1]
    keys = np.tile(states(seed, kv_heads, frame, size), (1, frames, 1))
    keys += 0.8 * states(seed + 1, kv_heads, frames * frame, size)
    values = states(seed + 2, kv_heads, frames * frame, size)
    options = (frame, case["keep_frames"] * frame, case["alpha"], case["recent_ratio"], grid)
    pooling = ((7, 3), (5, 2), (3, 1), (1, 1)) if case["pooling"] else ((1, 1),)
    for (kernel, axes), positions in zip(pooling, case["positions"], strict=True):
        smallest = min(kernel, frames, *grid) if axes > 1 else kernel
        odd = smallest - (smallest % 2 == 0)
        assert infinipot_v.infinipot_v(keys, values, *options, odd, axes) == positions


def test_infinipot_v_keeps_recent_frames_then_what_moved_then_large_values():
    # Three frames of two tokens; the first token of the first frame differs from the last frame's.
    keys = np.array([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    values = np.array([[[1.0], [2.0], [3.0], [9.0], [1.0], [1.0]]])
    assert infinipot_v.infinipot_v(keys, values, 2, 4, alpha=0.75) == [[0, 3, 4, 5]]
    assert infinipot_v.infinipot_v(keys, values, 2, 4, alpha=0.25) == [[1, 2, 3, 5]]


@cases("sparsemm", lambda case: "budgets" in case)
def test_sparsemm_gives_the_released_budgets_and_positions(case):
    layers, heads, kv_heads, window = (case[k] for k in ("layers", "heads", "kv_heads", "window"))
    scores = (uniform(case["seed"] + 50, layers, heads, 6) ** 6).mean(-1)
    budgets = sparsemm.sparsemm_budgets(scores, case["keep"], kv_heads, window, case["ratio"])
    assert budgets.tolist() == case["budgets"]
    attention = causal_attention(*prompt(case))
    for layer in range(layers):
        arguments = (case["keep"], window, case["kernel"], case["pooling"])
        kept = sparsemm.sparsemm_positions(attention, budgets[layer], *arguments)
        assert [len(head) for head in kept] == case["lengths"][layer]
        if layer == 0:
            assert kept == case["first_layer"]


@cases("sparsemm", lambda case: "scores" in case)
def test_sparsemm_scores_heads_by_the_released_hits(case):
    images = [
        [
            (rows(10 * i + t, case["layers"], case["heads"], case["keys"]), np.arange(3 * t, 4 * t + 6))
            for t in range(case["tokens"])
        ]
        for i in range(case["images"])
    ]
    np.testing.assert_allclose(sparsemm.visual_scores(images), case["scores"], rtol=1e-12)


def test_average_pooling_divides_by_the_kernel_at_the_edges_and_stops_before_the_window():
    attention = np.zeros((1, 6, 6))
    attention[0, -2:] = [[4, 0, 0, 8, 0, 0], [2, 0, 0, 0, 5, 1]]
    assert window_scores(attention, 2, 3, "average", 1)[0].tolist() == pytest.approx([2, 2, 8 / 3, 8 / 3])
    assert window_scores(attention, 2, 3, "max", 1)[0].tolist() == [6, 6, 8, 8]


def test_of_equal_scores_the_later_positions_are_the_largest():
    assert largest([1, 3, 3, 3, 0], 2) == [2, 3]


def test_elastic_merges_into_the_nearest_unprotected_anchor_and_the_earlier_of_two():
    importance = [0.0, 9.0, 0.0, 0.0, 0.0, 8.0, 0.0, 0.0]
    attention = np.zeros((1, 8, 8))
    attention[0, -1] = importance
    states = np.arange(8.0).reshape(1, 8, 1)
    positions, keys, _ = elastic.elastic_prefill(attention, states, states, 4)
    assert positions == [0, 1, 5, 7]
    assert keys[0, :, 0].tolist() == [0, (1 + 2 + 3) / 3, (4 + 5 + 6) / 3, 7]


def test_vl_cache_counts_zeroed_weights_of_the_visible_part():
    attention = np.zeros((2, 4, 4))
    attention[0, 2:] = [[0.995, 0.004, 0.001, 0], [0.4, 0.3, 0.3, 0.0001]]
    attention[1, 2:] = [[0.3, 0.3, 0.4, 0], [0.997, 0.001, 0.001, 0.001]]
    assert vl_cache.vl_cache_sparsity(attention, 2) == pytest.approx((3 / 7 + 3 / 7) / 2)


def test_vl_cache_shares_the_budget_by_density_and_clips():
    assert vl_cache.vl_cache_budgets([0.5, 0.75, 0.75], 0.1, 400) == [60, 30, 30]
    assert vl_cache.vl_cache_budgets([0.0, 0.999, 0.999], 0.5, 400) == [400, 4, 4]


def test_vl_cache_keeps_the_recent_tenth_and_the_highest_scores():
    attention = np.zeros((2, 12, 12))
    attention[:, -1, [1, 4]] = [[3, 0], [1, 5]]
    assert vl_cache.vl_cache_positions(attention, 2, 1, 1) == [[4, 11]]
    assert vl_cache.vl_cache_positions(attention, 2, 1, 2) == [[1, 11], [4, 11]]
