"""Expected Attention, KVzip and InfiniPot-V against brute force and the outputs of their authors' functions."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparsight import recipe
from sparsight.attention.rope import Rope
from sparsight.cache.prefill import Prefill
from sparsight.compression import AcrossLayers
from sparsight.compression.allocate import LayerStatistics
from sparsight.compression.reconstruction import largest_attention
from sparsight.compression.reduce import top_positions
from sparsight.compression.score import PromptStates
from sparsight.models.prompt import Prompt, Span
from tests.goldens.inputs import states
from tests.goldens.test_released import cases, prompt
from tests.support import models
from tests.support.released.expected_attention import expected_attention_scores
from tests.support.released.infinipot_v import infinipot_v
from tests.support.released.kvzip import kvzip_chunk_scores, kvzip_chunks, kvzip_positions


def rotary(size):
    """A language part with rotary embedding for heads of ``size``."""
    config = LlamaConfig(**{**models.model("llama").config.to_dict(), "head_dim": size})
    return SimpleNamespace(rotary_emb=LlamaRotaryEmbedding(config))


def prompt_of(spans, length):
    vision = torch.zeros(len(spans), length, dtype=torch.bool)
    valid = vision.clone()
    for row, span in enumerate(spans):
        valid[row, span.start : span.stop] = True
    return Prompt(vision, valid, tuple(spans), ((),) * len(spans))


def expected_scores(queries, keys, values, spans, positions, chunk, **numbers):
    """Scores of the method as the cache computes them: queries ``[B, H, T, D]`` before RoPE, keys after it."""
    length, size = queries.shape[2:]
    located, language = prompt_of(spans, length), rotary(size)
    module = models.model("llama").model.layers[0].self_attn
    prefill, rope = None, None
    for first in range(0, length, chunk):
        part = slice(first, min(first + chunk, length))
        rope = Rope(language, positions[:, part], located.valid_mask[:, part], rope)
        rotation = rope.of(module)
        rotated = rotation.apply(queries[:, :, part], queries[:, :1, part], *rope.newest)[0]
        if prefill is None:
            prefill = Prefill(recipe("expected-attention", **numbers), located, keys[:, :, part], values[:, :, part])
        else:
            prefill.extend(keys[:, :, part], values[:, :, part])
        prefill.rotation = rotation
        prefill.observe(rotated, size**-0.5)
    prefill.finish()
    return prefill.scores


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(6, 30), min_size=1, max_size=3),
    group=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 3),
    size=st.sampled_from([4, 8]),
    future=st.integers(1, 20),
    sinks=st.integers(0, 4),
    chunk=st.sampled_from([5, 100]),
    skipped=st.integers(0, 9),
)
def test_expected_attention_equals_the_brute_force(lengths, group, kv_heads, size, future, sinks, chunk, skipped):
    torch.manual_seed(sum(lengths) + size)
    longest = max(lengths)
    spans = [Span(longest - length, longest - 1, longest) for length in lengths]
    heads = group * kv_heads
    queries = torch.randn(len(lengths), heads, longest, size) + torch.randn(1, heads, 1, size)
    keys, values = torch.randn(2, len(lengths), kv_heads, longest, size)
    # Padding has no positions; as with multimodal RoPE, some are fewer than the tokens.
    positions = torch.stack([(torch.arange(longest) - span.start).clamp(0, longest - skipped) for span in spans])
    scores = expected_scores(queries, keys, values, spans, positions, chunk, future=future, sinks=sinks)
    frequencies = rotary(size).rotary_emb.inv_freq.double().numpy()
    for row, (span, own) in enumerate(zip(spans, scores, strict=True)):
        valid = [each[row, :, span.start : span.stop].double().numpy() for each in (queries, keys, values)]
        following = int(positions[row, span.start : span.stop].max()) + 1
        brute = expected_attention_scores(*valid, frequencies, following, future, sinks)
        assert_close(own[:, sinks:].double(), torch.from_numpy(brute[:, sinks:]), rtol=2e-4, atol=1e-6)
        assert (own[:, :sinks] >= own[:, sinks:].amax(-1, keepdim=True)).all()


@cases("expected_attention", lambda case: case["covariance"] and not case["epsilon"])
def test_expected_attention_gives_the_scores_of_the_authors_code(case):
    heads, kv_heads, length, size, sinks = (case[k] for k in ("heads", "kv_heads", "length", "size", "sinks"))
    queries, keys = prompt(case)
    queries += states(case["seed"] + 300, heads, 1, size)
    values = states(case["seed"] + 900, kv_heads, length, size)
    given_states = [torch.from_numpy(each).float()[None] for each in (queries, keys, values)]
    numbers = {"future": case["future"], "sinks": sinks}
    (own,) = expected_scores(*given_states, [Span(0, length, length)], torch.arange(length)[None], length, **numbers)
    assert_close(own[:, sinks:], torch.tensor(case["scores"])[:, sinks:], rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 3),
    length=st.integers(1, 30),
    count=st.integers(1, 20),
    place=st.floats(0, 1),
    sinks=st.integers(0, 4),
)
def test_the_largest_attention_equals_the_brute_force(group, kv_heads, length, count, place, sinks):
    torch.manual_seed(length)
    start = min(round(place * length), length - 1)
    sinks = min(sinks, start)
    query, keys = torch.randn(group * kv_heads, count, 8), torch.randn(kv_heads, length, 8)
    repeated = torch.randn(kv_heads, count, 8)
    context = torch.cat([keys[:, :sinks], keys[:, start:]], dim=1)
    own = largest_attention(query, context, repeated, 8**-0.5)[:, sinks:]
    numpy = [each.double().numpy() for each in (query, keys, repeated)]
    brute = kvzip_chunk_scores(*numpy, start, length, sinks)
    assert_close(own.double(), torch.from_numpy(brute), rtol=1e-4, atol=1e-6)


@cases("kvzip")
def test_kvzip_gives_the_scores_and_keeps_the_positions_of_the_authors_code(case):
    layers, heads, kv_heads, length, size, first = (
        case[k] for k in ("layers", "heads", "kv_heads", "length", "size", "first")
    )
    scores = torch.full((layers, kv_heads, length), torch.inf)
    for layer in range(layers):
        seed, scale = case["seed"] + 10 * layer, 2 + layer
        keys = torch.from_numpy(states(seed + 500, kv_heads, length, size, scale))
        for i, (start, end) in enumerate(kvzip_chunks(first, length, case["chunk"])):
            tokens = case["prompt"] + end - start
            query, repeated = (
                torch.from_numpy(states(seed + 100 * i + more, number, tokens, size, scale))
                for more, number in ((0, heads), (5000, kv_heads))
            )
            context = torch.cat([keys[:, :first], keys[:, start:end]], dim=1)
            scores[layer, :, start:end] = largest_attention(query, context, repeated, size**-0.5)[:, first:]
    assert_close(scores[..., first:], torch.tensor(case["scores"]), rtol=1e-4, atol=1e-6)
    for positions in case["positions"]:
        assert kept_across_layers(scores, first, total_of(positions)) == positions


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 4), heads=st.integers(1, 3), length=st.integers(6, 40), first=st.integers(1, 4),
    ratio=st.floats(0.1, 0.99),
)  # fmt: skip
def test_heads_of_all_layers_compete_as_in_the_brute_force(layers, heads, length, first, ratio):
    torch.manual_seed(length)
    scores = torch.rand(layers, heads, length)
    scores[..., :first] = torch.inf
    positions = kvzip_positions(scores.double().numpy(), ratio)
    assert kept_across_layers(scores, first, total_of(positions)) == positions


def total_of(positions):
    return sum(len(head) for layer in positions for head in layer)


def kept_across_layers(scores, first, total):
    """Positions kept by layer and head when ``total`` stay, the ``first`` of each head among them."""
    length = scores.shape[-1]
    always = torch.arange(length) < first
    vision = torch.zeros_like(always)
    statistics = [LayerStatistics(layer, 0.0, vision, always) for layer in scores]
    shares = AcrossLayers().shares(statistics, total / scores.numel())
    return [
        [
            top_positions(head[None], round(share * length), always, per_head=True)[0].tolist()
            for head, share in zip(layer, own, strict=True)
        ]
        for layer, own in zip(scores, shares, strict=True)
    ]


def vision_kept(keys, values, frame, budget, change=0.5, last=0.25, before=3, after=2):
    """Vision positions that each head keeps of a video between some text, all of which stays."""
    heads, count, size = keys.shape
    length = before + count + after
    key, value = torch.randn(2, heads, length, size)
    key[:, before : before + count], value[:, before : before + count] = keys, values
    vision = torch.zeros(length, dtype=torch.bool)
    vision[before : before + count] = True
    kept = budget + before + after
    chosen = recipe("infinipot-v", budget=kept / length, change=change, last=last)
    frames = [torch.arange(before, before + count).view(-1, frame)]
    states = PromptStates(key, value, vision, [], kept, chosen.reduce.always(kept, length), [], frames)
    accumulator = chosen.score.accumulator(heads, Span(0, length, length), torch.device("cpu"))
    positions = chosen.reduce.select(chosen.score.finish(accumulator, states), kept)
    outside = (positions < before) | (positions >= before + count)
    assert (outside.sum(-1) == before + after).all()
    return [[place - before for place in head.tolist() if before <= place < before + count] for head in positions]


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    frames=st.integers(2, 9),
    frame=st.integers(1, 6),
    share=st.floats(0, 1),
    change=st.floats(0, 1),
    last=st.floats(0.01, 1),
)
def test_infinipot_v_equals_the_brute_force(heads, frames, frame, share, change, last):
    torch.manual_seed(frames)
    keys, values = torch.randn(2, heads, frames * frame, 8)
    # All frames cannot be recent: there would be nothing to compare.
    last = min(last, 1 - 1 / frames)
    budget = round(share * frames * frame)
    numpy = [each.double().numpy() for each in (keys, values)]
    brute = infinipot_v(*numpy, frame, budget, change, last)
    assert vision_kept(keys, values, frame, budget, change, last) == brute


@cases("infinipot_v")
def test_infinipot_v_keeps_the_positions_of_the_authors_code(case):
    seed, heads, frames, size = (case[k] for k in ("seed", "kv_heads", "frames", "size"))
    frame = case["height"] * case["width"]
    keys = torch.from_numpy(states(seed, heads, frame, size)).repeat(1, frames, 1)
    keys += 0.8 * torch.from_numpy(states(seed + 1, heads, frames * frame, size))
    values = torch.from_numpy(states(seed + 2, heads, frames * frame, size))
    # The last quarter of the layers is not pooled, where any are.
    kept = vision_kept(keys, values, frame, case["keep_frames"] * frame, case["alpha"], case["recent_ratio"])
    assert kept == case["positions"][-1]
