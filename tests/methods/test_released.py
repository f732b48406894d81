"""MixKV, BACON and TGV-KV against brute force (tests/support/released) and their authors' outputs (tests/goldens)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight import CompressedCache, recipe
from sparsight.compression import LastQuery, MixKV, PostVision
from sparsight.compression.allocate import LayerStatistics
from sparsight.compression.eviction import EvictionState
from sparsight.compression.score import NewQueries, PromptStates
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.models.prompt import Span
from tests.goldens.inputs import causal_rows, states, uniform
from tests.goldens.test_released import cases, picture_prompt, prompt
from tests.support import models
from tests.support.models import NO_IMAGE, ONE_IMAGE, THREE_IMAGES
from tests.support.released import bacon, mixkv, tgv_kv
from tests.support.released.common import average_groups, causal_attention, window_scores

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
NO_VISION = np.zeros(0, dtype=bool)


def finished(chosen, queries, keys, values, kept, *, vision=NO_VISION, chunk=1000, earlier=None):
    """A recipe's score ``[H_kv, T]`` of one layer and the positions that stay, for arrays of states."""
    queries, keys, values = (torch.as_tensor(each).float() for each in (queries, keys, values))
    length = keys.shape[1]
    vision = torch.as_tensor(vision) if len(vision) else torch.zeros(length, dtype=torch.bool)
    first = int(vision.nonzero().max()) + 1 if vision.any() else max(length - 32, 0)
    span = Span(0, first, length)
    attention = chosen.score.accumulator(len(keys), span, torch.device("cpu"))
    rows = chosen.score.queries(span)
    for start in range(rows.start, rows.stop, chunk):
        stop = min(start + chunk, rows.stop)
        attention.add(NewQueries(queries[:, start:stop], keys[:, :stop], keys.shape[-1] ** -0.5))
    always = chosen.reduce.always(kept, length)
    prompt_states = PromptStates(keys, values, vision, [], kept, always, [] if earlier is None else earlier)
    score = chosen.score.finish(attention, prompt_states)
    return score.numpy(), chosen.reduce.select(score, min(kept, length)).tolist()


def as_states(attention):
    """Queries and keys whose causal attention is ``attention`` ``[H, T, T]``."""
    length = attention.shape[-1]
    return np.log(attention.clip(1e-30)) * length**0.5, np.eye(length)[None]


SHAPES = {
    "heads": st.integers(1, 2),
    "group": st.integers(1, 3),
    "window": st.integers(1, 12),
    "before": st.integers(8, 40),
    "pool": st.sampled_from([1, 5, 7]),
    "pooling": st.sampled_from(["max", "average"]),
    "chunk": st.sampled_from([3, 1000]),
    "seed": st.integers(0, 999),
}


@settings(deadline=None, max_examples=40)
@given(**SHAPES, share=st.floats(0.1, 1))
def test_mixkv_keeps_what_the_brute_force_keeps(heads, group, window, before, pool, pooling, chunk, seed, share):
    length, keep = before + window, window + max(1, int(share * before))
    queries, keys, values = (
        states(seed + n, h, length, 8) for n, h in ((0, heads * group), (500, heads), (900, heads))
    )
    chosen = recipe("mixkv", window=window, pool=pool, pooling=pooling)
    score, kept = finished(chosen, queries, keys, values, keep, chunk=chunk)
    assert kept == mixkv.mixkv(queries, keys, values, keep, window, pool, pooling)
    given_scores = window_scores(causal_attention(queries, keys), window, pool, pooling, heads)
    np.testing.assert_allclose(score[:, :before], mixkv.mixkv_scores(given_scores, keys, values), **CLOSE)


@cases("mixkv", lambda case: not case["fixed"])
def test_mixkv_ranks_as_the_authors_code(case):
    seed, kv_heads, length, size = (case[k] for k in ("seed", "kv_heads", "length", "size"))
    queries, keys = prompt(case)
    keys += 1.5 * states(seed + 700, kv_heads, 1, size)
    values = states(seed + 900, kv_heads, length, size) * (0.2 + uniform(seed + 950, kv_heads, length, 1))
    chosen = recipe("mixkv", window=case["window"], pool=case["kernel"])
    score, _ = finished(chosen, queries, keys, values, case["keep"])
    ranked = np.argsort(-score[:, : length - case["window"]])[:, : case["keep"] - case["window"]]
    assert ranked.tolist() == case["ranked"]


@settings(deadline=None, max_examples=20)
@given(length=st.integers(40, 60), group=st.integers(1, 2), kept=st.integers(2, 30), seed=st.integers(0, 99))
def test_mixkv_mixes_a_score_without_a_window_over_what_competes(length, group, kept, seed):
    queries, keys, values = (states(seed + n, h, length, 8) for n, h in ((0, 2 * group), (500, 2), (900, 2)))
    chosen = recipe("vl-cache").combined(score="mixkv:post-vision")
    assert chosen.score == MixKV(PostVision())
    score, _ = finished(chosen, queries, keys, values, kept)
    count = length - max(1, round(0.1 * kept))
    given_scores = average_groups(causal_attention(queries, keys)[:, -32:].sum(1), 2)[:, :count]
    np.testing.assert_allclose(score[:, :count], mixkv.mixkv_scores(given_scores, keys, values), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(**SHAPES, share=st.floats(0.1, 1), layers=st.integers(1, 7))
def test_bacon_scores_as_the_brute_force(heads, group, window, before, pool, pooling, chunk, seed, share, layers):
    length, capacity = before + window, max(1, int(share * before))
    chosen = recipe("bacon", window=window, pool=pool, pooling=pooling)
    own, base, last, earlier = [], [], [], []
    for layer in range(layers):
        queries, keys = (states(seed + 10 * layer + n, h, length, 8, 2) for n, h in ((0, heads * group), (500, heads)))
        own.append(finished(chosen, queries, keys, keys, capacity + window, chunk=chunk, earlier=earlier)[0])
        window_mean, newest = bacon.bacon_inputs(causal_attention(queries, keys), window, pool, pooling, heads)
        base.append(window_mean)
        last.append(newest)
    expected = bacon.bacon_scores(np.stack(base), np.stack(last), capacity)
    np.testing.assert_allclose(np.stack(own)[..., :before], expected, rtol=1e-3, atol=1e-6)


@cases("bacon")
def test_bacon_gives_the_scores_of_the_authors_code(case):
    length, window = case["length"], case["window"]
    chosen = recipe("bacon", window=window, pool=case["kernel"], pooling=case["pooling"])
    earlier = []
    for layer, expected in enumerate(case["scores"]):
        queries, keys = as_states(causal_rows(case["seed"] + layer, case["heads"], length, length))
        keys = np.repeat(keys, case["kv_heads"], 0)
        score, _ = finished(chosen, queries, keys, keys, case["capacity"] + window, earlier=earlier)
        np.testing.assert_allclose(score[:, : length - window], expected, **CLOSE)


@settings(deadline=None, max_examples=40)
@given(
    before=st.integers(3, 9),
    image=st.integers(4, 30),
    after=st.integers(1, 20),
    group=st.integers(1, 3),
    chunk=st.sampled_from([7, 1000]),
    budget=st.floats(0.25, 0.9),
    seed=st.integers(0, 999),
)
def test_tgv_kv_keeps_what_the_brute_force_keeps(before, image, after, group, chunk, budget, seed):
    length, chosen = before + image + after, recipe("tgv-kv", budget=budget)
    vision = (np.arange(length) >= before) & (np.arange(length) < before + image)
    attentions, layers = [], []
    for layer in range(3):
        queries, keys = states(seed + layer, 2 * group, length, 8), states(seed + 500 + layer, 2, length, 8)
        attentions.append(causal_attention(queries, keys))
        scores = tgv_kv.tgv_kv_scores(attentions[-1], vision)
        paid = torch.tensor(average_groups(attentions[-1], 1)[0, before + image :, vision].sum())
        always = torch.zeros(length, dtype=torch.bool)
        layers.append(LayerStatistics(torch.zeros(2, length), 0.0, torch.tensor(vision), always, paid.float()))
        for kept in (6, max(6, length // 2), length - 1):
            _, positions = finished(chosen, queries, keys, keys, kept, vision=vision, chunk=chunk)
            assert positions == [tgv_kv.tgv_kv_positions(scores, kept)] * 2
    shares = chosen.allocate.shares(layers, budget)
    expected = tgv_kv.tgv_kv_shares(attentions, vision) * 3 * budget
    # Where a layer is full the released code loses what it cannot hold.
    if expected.max() <= 1:
        np.testing.assert_allclose(shares, expected, rtol=1e-5)
    assert sum(shares) == pytest.approx(3 * budget)


@cases("tgv_kv")
def test_tgv_kv_keeps_the_positions_of_the_authors_code(case):
    attentions, vision = picture_prompt(case)
    chosen = recipe("tgv-kv")
    for attention, positions in zip(attentions, case["positions"], strict=True):
        queries, keys = as_states(attention)
        _, kept = finished(chosen, queries, keys, keys, len(positions), vision=vision)
        assert kept == [positions]


@settings(deadline=None, max_examples=40)
@given(length=st.integers(12, 40), after=st.integers(1, 6), generated=st.integers(2, 9), seed=st.integers(0, 999))
def test_tgv_kv_drops_what_the_brute_force_drops(length, after, generated, seed):
    # The brute force is of one step: later tokens are named so that it takes them for generated ones.
    # With none but the newest, it would hold one entry more.
    generator, heads = np.random.default_rng(seed), 2
    kept = [*range(4), *sorted(generator.choice(np.arange(4, length), length // 2, replace=False).tolist())]
    vision = np.arange(length) < length - after
    weights = generator.random((1, heads, len(kept) + generated))
    held = [*kept, *range(length + 1, length + generated)]
    (expected,) = tgv_kv.tgv_kv_decode(held, weights, vision, 1.0, 0.0, 1, protect="text")
    rule, span = LastQuery(sinks=4, per_head=False), Span(0, length - after, length)

    class Held:
        pass

    rows = Held()
    rows.heads, rows.held = heads, torch.tensor([len(held) + 1] * heads)
    # The newest token comes last; the brute force calls it by the first position after the prompt.
    rows.positions = torch.tensor([[*held, length + generated]] * heads, dtype=torch.int32)
    scores = rule.first_scores(torch.zeros(heads, len(held) + 1), rows.positions, span)
    zeros = torch.zeros(heads)
    state = EvictionState(zeros, zeros, zeros, zeros.long(), zeros.int(), scores)
    rule.protect(rows, state, length)
    rule.record(state.scores, torch.from_numpy(weights[0]).float())
    grows = rule.grows(rows.held, state, zeros + length)
    slots = rule.slots(rows, state, grows)
    left = [p for slot, p in enumerate(rows.positions[0].tolist()) if grows[0] or slot != slots[0]]
    assert slots[0] == slots[1]
    assert sorted(length if p == length + generated else p for p in left) == sorted(expected)


@pytest.mark.parametrize("heads", ["1:1", "1:2", "1:8"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("prompts", [(ONE_IMAGE,), (ONE_IMAGE, THREE_IMAGES, NO_IMAGE)], ids=["alone", "padded"])
def test_in_a_model_each_sequence_keeps_what_the_brute_force_keeps(prompts, family, heads):
    model, inputs = models.model(family, heads), models.inputs(family, *prompts)
    snapshot = PrefillSnapshot(model, inputs)
    numbers = {"window": 4, "budget": 0.4}
    chosen = [recipe("mixkv", **numbers), recipe("bacon", **numbers), recipe("tgv-kv", budget=0.4)]
    caches = []
    for each in chosen:
        caches.append(CompressedCache(model, each, inputs))
        models.generate(model, inputs, 1, past_key_values=caches[-1])
    layers = caches[0].report().layers
    for b, span in enumerate(snapshot.prompt.spans):
        valid, length = slice(span.start, span.stop), span.length
        per_layer = [
            [each[b, :, valid].double().numpy() for each in (one.query, one.key, one.value)] for one in snapshot.states
        ]
        attentions = [causal_or_masked(*pair, b, valid) for pair in zip(per_layer, snapshot.states, strict=True)]
        kv_heads, keep = len(per_layer[0][1]), round(0.4 * length)

        def check(cache, index, expected, b=b, first=span.start):
            held = cache.kept_positions(layers[index])[b]
            assert [[p - first for p in head.tolist() if p >= 0] for head in held] == expected

        base, last = zip(*(bacon.bacon_inputs(each, 4, 5, "average", kv_heads) for each in attentions), strict=True)
        calibrated = bacon.bacon_scores(np.stack(base), np.stack(last), keep - 4)
        for index, (_, keys, values) in enumerate(per_layer):
            window = list(range(length - 4, length))
            for cache, scores in (
                (caches[0], mixkv.mixkv_scores(base[index], keys, values)),
                (caches[1], calibrated[index]),
            ):
                best = [sorted(np.argsort(-head)[: keep - 4].tolist()) + window for head in scores]
                check(cache, index, best)
        vision = snapshot.prompt.vision_mask[b, valid].numpy()
        if not vision.any():
            continue
        shares = tgv_kv.tgv_kv_shares(attentions, vision) * len(layers) * 0.4
        assert shares.max() < 1
        for index, attention in enumerate(attentions):
            scores = tgv_kv.tgv_kv_scores(attention, vision)
            positions = tgv_kv.tgv_kv_positions(scores, round(shares[index] * length))
            check(caches[2], index, [positions] * kv_heads)


@pytest.mark.parametrize("name", ["mixkv", "bacon", "tgv-kv"])
def test_a_prompt_in_chunks_is_compressed_as_in_one_piece(name):
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES, NO_IMAGE)
    numbers = {} if name == "tgv-kv" else {"window": 4}
    kept = []
    for options in ({}, {"prefill_chunk_size": 9}):
        cache = CompressedCache(model, recipe(name, budget=0.3, **numbers), inputs)
        answer = models.generate(model, inputs, 12, past_key_values=cache, **options)
        kept.append([answer, *(cache.kept_positions(layer) for layer in cache.report().layers)])
    assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))


def causal_or_masked(arrays, layer, b, valid):
    """Attention ``[H, T, T]`` of a sequence in one layer."""
    queries, keys, _ = arrays
    logits = queries @ np.repeat(keys, len(queries) // len(keys), 0).transpose(0, 2, 1) * layer.scaling
    visible = np.tril(np.ones(logits.shape[1:], dtype=bool))
    if layer.visible is not None:
        visible = layer.visible[min(b, len(layer.visible) - 1), 0, valid, valid].numpy()
    weights = np.exp(np.where(visible, logits, -np.inf) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
