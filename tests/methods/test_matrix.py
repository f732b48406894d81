"""Every recipe on every model family: a tiny random model each."""

from functools import cache

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from sparsight import RECIPES, CompressedCache, recipe
from sparsight.cache.dense_store import growth_step
from sparsight.models.families import FAMILIES
from tests.support import models
from tests.support.families import LAYERS, TINY
from tests.support.models import NO_IMAGE, ONE_IMAGE, ONE_VIDEO, TEXT_ONLY, THREE_IMAGES
from tests.support.recipes import recipe_for

EVERY = [*TINY, *TEXT_ONLY]
TOKENS = 4
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def prompt_of(family):
    return NO_IMAGE if family in TEXT_ONLY else ONE_IMAGE


@cache
def of_the_full_cache(family):
    return torch.stack(models.logits(models.model(family), models.inputs(family, prompt_of(family)), TOKENS))


def test_every_family_of_the_table_is_here():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", EVERY)
def test_budget_one_equals_the_plain_model(family, name):
    model, inputs = models.model(family), models.inputs(family, prompt_of(family))
    compressed = CompressedCache(model, recipe_for(model, name, budget=1.0), inputs)
    logits = torch.stack(models.logits(model, inputs, TOKENS, past_key_values=compressed))
    assert_close(logits, of_the_full_cache(family), **CLOSE)
    assert torch.equal(logits.argmax(-1), of_the_full_cache(family).argmax(-1))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", EVERY)
def test_what_is_held_is_what_was_planned(family, name):
    model, inputs = models.model(family), models.inputs(family, prompt_of(family))
    budget = 1.0 if name == "full" else 0.3
    compressed = CompressedCache(model, recipe_for(model, name, budget=budget), inputs)
    (first,) = models.logits(model, inputs, 1, past_key_values=compressed)
    assert_close(first, of_the_full_cache(family)[0], **CLOSE)
    report = compressed.report()
    (length,) = report.prompt_tokens
    assert report.tokens_seen == length
    assert report.layers == list(range(1 if family in FAMILIES and FAMILIES[family].uncompressed_layers else 0, LAYERS))
    config = model.get_decoder().config
    heads, size = config.num_key_value_heads, 64 // config.num_attention_heads
    kept = [heads_kept for (heads_kept,) in report.kept]
    assert all(len(each) == heads and all(1 <= count <= length for count in each) for each in kept)
    # Every head's share is rounded, and one entry stays.
    assert sum(map(sum, kept)) <= (budget * length + 1) * heads * len(kept)
    for layer, counts in zip(report.layers, kept, strict=True):
        positions = compressed.kept_positions(layer)
        assert positions.shape == (1, heads, max(counts))
        assert (positions >= 0).sum(-1).tolist() == [counts]
        assert ((positions == length - 1).any(-1)).all()
        held = compressed.layers[layer].store.keys
        assert held.shape[-1] == size
        assert held.isfinite().all()
    entry = 2 * size * held.element_size()
    alone = compressed.nbytes - sum(layer.nbytes for layer in compressed.compressed)
    assert (alone > 0) == (report.layers[0] > 0)
    entries = [count for (layer,) in report.held for count in layer]
    assert sum(entries) * entry <= report.bytes_held - alone
    # Room to grow, and a position for each entry.
    assert report.bytes_held - alone <= sum(count + growth_step(max(entries)) for count in entries) * (entry + 4)
    assert report.full_bytes - alone == len(kept) * heads * length * entry
    compressed.reset()
    assert torch.stack(models.logits(model, inputs, TOKENS, past_key_values=compressed)).isfinite().all()


@pytest.mark.parametrize("name", ["vl-cache", "elastic", "h2o"])
@pytest.mark.parametrize("family", EVERY)
def test_padded_batches_and_videos_at_budget_one_equal_the_plain_model(family, name):
    model = models.model(family)
    batches = [(NO_IMAGE, models.Prompt(0, 40, 3))]
    if family in TINY:
        batches = [(ONE_IMAGE, THREE_IMAGES, models.NO_TEXT_AFTER, NO_IMAGE), (THREE_IMAGES,), (NO_IMAGE,)]
    if family in TINY and TINY[family].video:
        batches += [(ONE_VIDEO,), (ONE_VIDEO, NO_IMAGE, models.Prompt(0, 2, 0, videos=2))]
    for prompts in batches:
        inputs = models.inputs(family, *prompts)
        compressed = CompressedCache(model, recipe_for(model, name, budget=1.0), inputs)
        logits = torch.stack(models.logits(model, inputs, TOKENS, past_key_values=compressed))
        assert_close(logits, torch.stack(models.logits(model, inputs, TOKENS)), **CLOSE)


BOTH_MEDIA = [name for name, tiny in TINY.items() if tiny.video and name != "glm4v"]
"""GLM-4V marks images and videos by one token, and transformers takes one kind in a batch."""


@pytest.mark.parametrize("family", BOTH_MEDIA)
def test_images_and_videos_in_one_prompt(family):
    model = models.model(family)
    inputs = models.inputs(family, models.Prompt(1, 3, 4, videos=1), ONE_IMAGE, ONE_VIDEO)
    compressed = CompressedCache(model, recipe("vl-cache", budget=1.0), inputs)
    assert torch.equal(
        models.generate(model, inputs, TOKENS, past_key_values=compressed), models.generate(model, inputs, TOKENS)
    )


@pytest.mark.parametrize(
    "name", ["vl-cache", "elastic", "mixkv", "bacon", "tgv-kv", "expected-attention", "kvzip", "infinipot-v"]
)
@pytest.mark.parametrize("family", TINY)
def test_each_prompt_of_a_padded_batch_keeps_and_answers_what_it_does_alone(family, name):
    model, prompts = models.model(family), [ONE_IMAGE, THREE_IMAGES, NO_IMAGE]
    together = models.inputs(family, *prompts)
    compressed = CompressedCache(model, recipe_for(model, name, budget=0.4), together)
    logits = torch.stack(models.logits(model, together, TOKENS, past_key_values=compressed))
    for row, prompt in enumerate(prompts):
        alone = models.inputs(family, prompt, seed=row)
        own = CompressedCache(model, recipe_for(model, name, budget=0.4), alone)
        assert_close(
            torch.stack(models.logits(model, alone, TOKENS, past_key_values=own))[:, 0], logits[:, row], **CLOSE
        )
        padding = together["input_ids"].shape[1] - alone["input_ids"].shape[1]
        for layer in own.report().layers:
            kept, expected = compressed.kept_positions(layer)[row], own.kept_positions(layer)[0]
            kept = torch.where(kept < 0, kept, kept - padding)
            assert torch.equal(kept[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("family", TINY)
def test_beams_and_conversations_at_budget_one_equal_the_full_cache(family):
    model, inputs = models.model(family), models.inputs(family, ONE_IMAGE, THREE_IMAGES)
    answers = []
    for full in (False, True):
        compressed = None if full else CompressedCache(model, recipe("vl-cache", budget=1.0), inputs)
        beams = models.generate(model, inputs, 5, past_key_values=compressed, num_beams=2)
        compressed = None if full else CompressedCache(model, recipe("vl-cache", budget=1.0), inputs)
        first = model.generate(
            **inputs, past_key_values=compressed, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9], [6, 5, 4]])], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        answers.append((beams, models.generate(model, turn, 5, past_key_values=first.past_key_values)))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


@torch.no_grad()
def test_what_follows_a_prefix_is_causal_as_with_the_full_cache():
    # PaliGemma asks the cache whether its prefix, in which tokens see each other, has been seen.
    model, inputs = models.model("paligemma"), models.inputs("paligemma", ONE_IMAGE)
    turn = torch.tensor([[7, 8, 9, 10, 11]])
    types = torch.zeros(1, inputs["input_ids"].shape[1] + 5, dtype=torch.long)
    logits = []
    for held in (DynamicCache(), CompressedCache(model, recipe("vl-cache", budget=1.0), inputs)):
        model(**inputs, past_key_values=held)
        step = {"input_ids": turn, "attention_mask": torch.ones_like(types), "token_type_ids": types}
        logits.append(model(**step, past_key_values=held).logits)
    assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "minicpmv4_6", "qwen3_vl"])
def test_eager_attention_keeps_what_sdpa_keeps(family):
    model, inputs = models.fresh_model(family), models.inputs(family, ONE_IMAGE, THREE_IMAGES)
    kept = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        compressed = CompressedCache(model, recipe("h2o", budget=0.3), inputs)
        models.generate(model, inputs, 1, past_key_values=compressed)
        kept.append([compressed.kept_positions(layer) for layer in compressed.report().layers])
        del compressed
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


@pytest.mark.parametrize("heads", ["1:1", "1:8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", TINY)
def test_other_groupings_and_dtypes(family, dtype, heads):
    model, inputs = models.model(family, heads, dtype), models.inputs(family, ONE_IMAGE, THREE_IMAGES, dtype=dtype)
    expected = models.logits(model, inputs, 2)
    for budget in (1.0, 0.3):
        compressed = CompressedCache(model, recipe("vl-cache", budget=budget), inputs)
        logits = models.logits(model, inputs, 2, past_key_values=compressed)
        assert torch.stack(logits).isfinite().all()
        assert compressed.entries(compressed.report().layers[0], 0, 0)[1].dtype == dtype
        assert_close(logits[0], expected[0])
        if budget == 1.0:
            assert_close(logits[1], expected[1], rtol=0.1, atol=0.25)
