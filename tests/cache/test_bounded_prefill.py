"""A prefill that is bounded keeps what an unbounded one keeps, in a part of its memory, and says where it does not."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from sparsight import CompressedCache, VLCache, recipe
from sparsight.bench.shapes import SHAPES
from sparsight.cache.bounded_prefill import BoundedPrefill, allowance
from sparsight.cache.layer import CompressedLayer
from sparsight.compression import Evict, Pyramid
from sparsight.models.prompt import Prompt, Span
from tests.support import models, reference
from tests.support.families import text_config
from tests.support.memory import PeakMemory
from tests.support.models import NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES, generate
from tests.support.recipes import STATIC, recipe_for

EVICTING = [
    name
    for name in STATIC
    if name != "full" and isinstance(recipe(name).reduce, Evict) and not recipe(name).score.needs_replay
]
IN_CHUNKS = [name for name in EVICTING if not recipe(name).score.needs_full_prompt]
BATCH = (ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER)
TEXTS = tuple(models.Prompt(0, length, 0) for length in (60, 90, 40))


@pytest.fixture
def cuts(monkeypatch):
    """Entries of each sequence before and after every cut."""
    counts = []
    cut = BoundedPrefill.cut

    def counted(prefill, *arguments):
        def held():
            return [prefill.entries(row)[0].shape[1] for row in range(len(prefill.allowances))]

        before = held()
        cut(prefill, *arguments)
        counts.append((before, held()))

    monkeypatch.setattr(BoundedPrefill, "cut", counted)
    return counts


def both(model, inputs, chosen, bound, tokens=32, **options):
    """A cache without a bound and one with, after the same answer."""
    whole, bounded = (CompressedCache(model, chosen, inputs, prefill_bound=each) for each in (None, bound))
    expected = generate(model, inputs, tokens, past_key_values=whole, **options)
    assert torch.equal(generate(model, inputs, tokens, past_key_values=bounded, **options), expected)
    return whole, bounded


def check_same_entries(whole, bounded):
    assert whole.report().kept == bounded.report().kept
    for index, layer in enumerate(whole.report().layers):
        for b in range(len(whole.prompt.spans)):
            for h in range(len(whole.report().held[index][b])):
                same = zip(whole.entries(layer, b, h), bounded.entries(layer, b, h), strict=True)
                assert all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize("heads", ["1:1", "1:2", "1:8"])
@pytest.mark.parametrize("name", EVICTING)
def test_a_whole_prompt_is_compressed_as_without_a_bound(name, heads, cuts):
    model, inputs = models.model("llava", heads), models.inputs("llava", *BATCH)
    whole, bounded = both(model, inputs, recipe_for(model, name, budget=0.25), 3.0)
    check_same_entries(whole, bounded)
    assert (bounded.report().exact, bounded.report().cut_short) == (True, [])
    assert cuts == [([31, 65, 24], [24, 49, 18])] * 3


@pytest.mark.parametrize("name", ["vl-cache", "h2o", "adakv", "sparsight"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma"])
def test_a_whole_prompt_in_half_precision_and_one_that_is_seen_in_both_directions(name, family, cuts):
    dtype = torch.bfloat16
    model, inputs = models.model(family, "1:2", dtype), models.inputs(family, *BATCH, dtype=dtype)
    check_same_entries(*both(model, inputs, recipe_for(model, name, budget=0.2), 3.0))
    assert all(sum(after) < sum(before) for before, after in cuts)


def test_beams_of_a_bounded_prefill_are_those_without_a_bound(cuts):
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    both(model, inputs, VLCache(budget=0.25), 3.0, num_beams=3)
    assert cuts == [([31] * 3 + [65] * 3, [24] * 3 + [49] * 3)] * 3


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_chunks_of_which_nothing_is_cut_are_as_without_a_bound(name):
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH)
    whole, bounded = both(model, inputs, recipe_for(model, name, budget=0.25), 4.0, prefill_chunk_size=17)
    check_same_entries(whole, bounded)
    assert (bounded.report().exact, bounded.report().cut_short) == (True, [])


def test_chunks_that_stay_within_the_allowance_until_the_last_are_exact(cuts):
    model, inputs = models.model("llama"), models.inputs("llama", models.Prompt(0, 60, 0))
    whole, bounded = both(model, inputs, VLCache(budget=0.25), 3.0, prefill_chunk_size=45)
    check_same_entries(whole, bounded)
    assert cuts == [([45], [45])] * 3 + [([60], [45])] * 3
    assert bounded.report().exact


def test_a_layer_that_was_planned_more_than_its_allowance_says_so():
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH)
    chosen = replace(recipe("snapkv", budget=0.25, window=4), allocate=Pyramid())
    whole, bounded = (CompressedCache(model, chosen, inputs, prefill_bound=bound) for bound in (None, 1.2))
    for cache in (whole, bounded):
        generate(model, inputs, 4, past_key_values=cache)
    planned, report = whole.report().kept, bounded.report()
    assert (whole.report().cut_short, report.cut_short, report.exact) == ([], [0], True)
    assert report.kept[1:] == planned[1:]
    assert [heads[0] for heads in report.kept[0]] == [10, 20, 8]
    # What stays is the best of what was planned.
    for most, own, held in zip(whole.kept_positions(0), bounded.kept_positions(0), report.kept[0], strict=True):
        for planned_positions, positions in zip(most.tolist(), own.tolist(), strict=True):
            assert set(positions) - {-1} <= set(planned_positions)
            assert len(set(positions) - {-1}) == held[0]
    assert report.caveats() == ["Cut short: fewer entries than planned were left by the bound in layers 0."]
    assert report.caveats()[0] in str(report)
    assert whole.report().caveats() == []


def brute_force(chosen, bound, spans, query, keys, values, chunk, scaling):
    """Outputs, and the positions and final scores of what is held, by sequence and KV head, token by token."""
    group = query.shape[1] // keys.shape[1]
    output, held, scores = torch.zeros_like(query), [], []
    for b, span in enumerate(spans):
        length = span.length
        score_of_span = chosen.fitted(length, 0).score
        rows = score_of_span.queries(span)
        most = allowance(bound, chosen.budget, length)
        own = torch.zeros(keys.shape[1], length)
        heads = [[] for _ in own]
        vision = torch.zeros(length, dtype=torch.bool)
        for first in range(0, query.shape[2], chunk):
            new = [i for i in range(first, min(first + chunk, query.shape[2])) if span.start <= i < span.stop]
            window = torch.zeros_like(own)
            for h, positions in enumerate(heads):
                before = list(positions)
                for i in new:
                    seen = before + [j - span.start for j in new if j <= i]
                    places = torch.tensor(seen) + span.start
                    for g in range(group):
                        weights = (query[b, h * group + g, i] @ keys[b, h, places].T * scaling).softmax(-1)
                        output[b, h * group + g, i] = weights @ values[b, h, places]
                        if i in rows:
                            own[h, seen] += weights / group
                        if new and i > new[-1] - 32:
                            window[h, seen] += weights / group
                positions += [i - span.start for i in new]
            if not new:
                continue
            covered = not rows or rows.start <= max(new[0], new[-1] - 31) or first + chunk >= query.shape[2]
            score = score_of_span.importance(own if covered else window, vision, [])
            for h, positions in enumerate(heads):
                if len(positions) > most:
                    stay = reference.vl_cache_positions(score[h, positions].tolist(), most, chosen.reduce.recent)
                    heads[h] = [positions[index] for index in stay]
        held.append(heads)
        scores.append(score_of_span.importance(own, vision, []))
    return output, held, scores


@pytest.mark.parametrize("chunk", [40, 13, 64])
@pytest.mark.parametrize(
    "chosen",
    [VLCache(budget=0.1), recipe("h2o", budget=0.1), recipe("snapkv", budget=0.1)],
    ids=lambda chosen: chosen.name,
)
def test_chunks_see_what_the_brute_force_leaves_of_those_before_them(chosen, chunk, monkeypatch):
    monkeypatch.setattr("sparsight.cache.bounded_prefill.BLOCK_ROWS", 16)
    if chosen.name == "snapkv":
        chosen = replace(chosen, reduce=Evict(recent=0.3))
    length, bound, generator = 130, 2.5, torch.Generator().manual_seed(chunk)
    query, keys, values = (torch.randn(3, heads, length, 8, generator=generator) * 2 for heads in (4, 2, 2))
    spans = (Span(0, 119, 130), Span(47, 60, 130), Span(3, 80, 110))
    valid = torch.zeros(3, length, dtype=torch.bool)
    for row, span in zip(valid, spans, strict=True):
        row[span.start : span.stop] = True
    prompt = Prompt(torch.zeros_like(valid), valid, spans, ((), (), ()))
    expected, held, scores = brute_force(chosen, bound, spans, query, keys, values, chunk, 0.3)
    prefill, outputs = None, []
    for first in range(0, length, chunk):
        part = [states[:, :, first : first + chunk] for states in (query, keys, values)]
        if prefill is not None and prefill.remaining is not None:
            outputs.append((first, prefill.attend_cut(*part, 0.3)))
            continue
        if prefill is None:
            prefill = BoundedPrefill(chosen, prompt, *part[1:], bound)
        else:
            prefill.extend(*part[1:])
        prefill.observe(part[0], 0.3)
        prefill.cut(part[0], 0.3)
        for states in (states for row in prefill.remaining or [] for states in row[:2]):
            # Not even a sequence that is short as yet keeps the batch alive.
            assert states.untyped_storage().nbytes() == states.nbytes
    assert outputs and not prefill.exact
    for first, output in outputs:
        assert_close(output, expected[:, :, first : first + chunk].transpose(1, 2), rtol=1e-4, atol=1e-4)
    for row, heads in enumerate(held):
        own_keys, own_values, positions = prefill.entries(row)
        assert positions.tolist() == heads
        assert_close(prefill.scores[row], scores[row], rtol=1e-4, atol=1e-4)
        for states, given in ((own_keys, keys), (own_values, values)):
            for h, places in enumerate(heads):
                assert torch.equal(states[h], given[row, h, torch.tensor(places) + spans[row].start])


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_in_chunks_each_sequence_of_a_padded_batch_answers_as_it_does_alone(name):
    model = models.model("llama")
    together = models.inputs("llama", *TEXTS)

    def answered(inputs):
        cache = CompressedCache(model, recipe_for(model, name, budget=0.2), inputs, prefill_bound=2)
        # The paddings, 30 and 50, are whole chunks.
        answer = generate(model, inputs, 12, past_key_values=cache, prefill_chunk_size=10)
        assert not cache.report().exact
        return answer, cache.report().kept

    answers, kept = answered(together)
    for row, prompt in enumerate(TEXTS):
        answer, own = answered(models.inputs("llama", prompt, seed=row))
        assert answer[0].tolist() == answers[row].tolist()
        assert [layer[0] for layer in own] == [layer[row] for layer in kept]


def test_masks_of_eager_attention_are_about_the_new_chunk_once_something_was_cut():
    model, inputs = models.fresh_model("llava"), models.inputs("llava", *BATCH)
    answers = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        cache = CompressedCache(model, VLCache(budget=0.2), inputs, prefill_bound=2)
        answers.append(generate(model, inputs, 12, past_key_values=cache, prefill_chunk_size=9))
    assert torch.equal(*answers)


def test_every_layer_is_cut_before_the_next_one_is_observed(monkeypatch):
    model, inputs = models.model("llama"), models.inputs("llama", models.Prompt(0, 900, 0))
    memory, alive = PeakMemory(), []
    attend, compact = CompressedLayer.attend_prompt, CompressedCache._compact

    def counted(layer, module, query, key, value, *arguments, **options):
        # Of the layers before it nothing is left but what was cut out.
        alive.append(memory.live)
        for states in (key, value):
            memory.count(states.untyped_storage())
        return attend(layer, module, query, key, value, *arguments, **options)

    def checked(cache):
        held.extend(layer.nbytes for layer in cache.compressed)
        compact(cache)

    held = []
    monkeypatch.setattr(CompressedLayer, "attend_prompt", counted)
    monkeypatch.setattr(CompressedCache, "_compact", checked)
    cache = CompressedCache(model, VLCache(budget=0.1), inputs, prefill_bound=3)
    generate(model, inputs, 1, past_key_values=cache)
    assert alive == [0, 0, 0]
    assert held == [allowance(3, 0.1, 900) * 2 * 2 * 16 * 4] * 3


@pytest.mark.parametrize("name", ["vl-cache", "h2o", "snapkv", "streaming-llm"])
def test_chunks_peak_at_less_than_two_fifths_of_the_full_cache(name):
    layers, length, chunk = 16, 2048, 64
    torch.manual_seed(0)
    config = LlamaConfig(**{**text_config("1:2"), "num_hidden_layers": layers, "head_dim": 64})
    model, inputs = LlamaForCausalLM(config).eval(), models.inputs("llama", models.Prompt(0, length, 0))
    cache = CompressedCache(model, recipe(name, budget=0.1), inputs, prefill_bound=3)
    with torch.no_grad(), PeakMemory(*model.parameters(), *model.buffers()) as memory:
        for ids in inputs["input_ids"].split(chunk, dim=1):
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            assert cache.nbytes <= layers * allowance(3, 0.1, length) * 2 * 2 * 64 * 4
    report = cache.report()
    assert not report.exact
    # All that the model computes counts, but its weights.
    assert memory.peak < 0.4 * report.full_bytes


def test_128k_tokens_of_a_model_of_seven_billion_parameters_peak_at_less_than_a_third():
    config, length, chunk = SHAPES["llava-next-mistral-7b"], 2**17, 4096
    entry, position, score = 2 * 128 * 2, 8, 4
    assert config.hidden_size // config.num_attention_heads == 128
    most = allowance(3, 0.1, length)
    every = most * (entry + position) + length * score
    # In the layer that is worked on: what is held with a chunk behind it, the chunk itself, and sums of new queries.
    one = (most + chunk) * (entry + position) + chunk * entry + 2 * length * score
    assert config.num_hidden_layers * every + one < config.num_hidden_layers * length * entry / 3


@pytest.mark.parametrize("bound", [0.5, 0, -1, float("nan"), float("inf"), "3"])
def test_a_bound_must_be_a_number_of_at_least_one(bound):
    with pytest.raises(ValueError, match="prefill_bound must be a number of at least 1, got"):
        CompressedCache(models.model("llava"), VLCache(), models.inputs("llava", ONE_IMAGE), prefill_bound=bound)


@pytest.mark.parametrize("name", ["elastic", "look-m"])
def test_methods_that_merge_are_refused(name):
    with pytest.raises(ValueError, match="merges the entries that go into those that stay"):
        CompressedCache(models.model("llava"), recipe(name), models.inputs("llava", ONE_IMAGE), prefill_bound=3)


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("llava", "aircache", "'elite-window' needs all of it"),
        ("llava", "mixkv", "'mixkv' needs all of it"),
        ("llava", "bacon", "'bacon' needs all of it"),
        ("llava", "tgv-kv", "'text-grounded' needs all of it"),
        ("paligemma", "vl-cache", "lets tokens attend to later ones"),
    ],
)
def test_chunks_of_which_nothing_may_be_cut_are_refused(family, name, why):
    model, inputs = models.model(family), models.inputs(family, ONE_IMAGE)
    cache = CompressedCache(model, recipe(name), inputs, prefill_bound=3)
    with pytest.raises(ValueError, match=why):
        generate(model, inputs, 2, past_key_values=cache, prefill_chunk_size=20)


def test_assisted_generation_is_refused():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = CompressedCache(model, VLCache(), inputs, prefill_bound=3)
    with pytest.raises(ValueError, match="which a bounded prefill cannot take"):
        generate(model, inputs, 5, past_key_values=cache, prompt_lookup_num_tokens=3)


def test_a_reset_cache_is_exact_again():
    model, inputs = models.model("llama"), models.inputs("llama", TEXTS[1], seed=1)
    cache = CompressedCache(model, VLCache(budget=0.2), inputs, prefill_bound=2)
    generate(model, inputs, 1, past_key_values=cache, prefill_chunk_size=10)
    assert not cache.report().exact
    assert "Approximate: each chunk" in str(cache.report())
    cache.reset()
    assert cache.report().exact
