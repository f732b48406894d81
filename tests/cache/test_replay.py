"""A prompt is repeated as the model would process it if it stood there twice."""

import pytest
import torch
from torch.testing import assert_close

import sparsight
from sparsight import CompressedCache, KVzip
from sparsight.methods.kvzip import with_instructions
from tests.support import models
from tests.support.families import TINY
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, ONE_VIDEO, THREE_IMAGES
from tests.support.recipes import INSTRUCTIONS

BOTH_DIRECTIONS = ("gemma3", "paligemma")
"""Images of a prefill are seen in both directions, those that are repeated are not."""

CAUSAL = [*(name for name in TINY if name not in BOTH_DIRECTIONS), *models.TEXT_ONLY]
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@pytest.fixture
def received(monkeypatch):
    """The largest attention that each position receives, by layer and sequence."""
    totals = []
    compact = CompressedCache._compact

    def noted(cache):
        totals.append([[each.total.clone() for each in layer.prefill.attention] for layer in cache.compressed])
        compact(cache)

    monkeypatch.setattr(CompressedCache, "_compact", noted)
    return totals


def twice(family, inputs, again=slice(None), ids=INSTRUCTIONS[0]):
    """One prompt, an instruction, and some of its tokens again, all of them with their image."""
    instruction = torch.tensor([ids])
    between = {"input_ids": instruction, "attention_mask": torch.ones_like(instruction)}
    doubled = {
        name: torch.cat([each, between.get(name, torch.zeros_like(instruction)), each[:, again]], dim=1)
        for name, each in inputs.items()
        if name in TEXT
    }
    pixels = {name: each for name, each in inputs.items() if name not in TEXT}
    return doubled | (TINY[family].collate([[pixels, pixels]]) if pixels else {})


@torch.no_grad()
def attention_of(family, inputs):
    """Attention ``[H, S, S]`` of each layer of plain attention, by the model's own eager code."""
    model = models.fresh_model(family)
    model.set_attn_implementation("eager")
    # What is processed in one piece starts without any state.
    return [each[0] for each in model(**inputs, output_attentions=True, use_cache=False).attentions if each is not None]


def largest(attention, length, kv_heads):
    return attention[:, length:, :length].unflatten(0, (kv_heads, -1)).amax((1, 2))


def compressed(family, *prompts, budget=0.3, **numbers):
    model, inputs = models.fresh_model(family), models.inputs(family, *prompts)
    options = {"prefill_chunk_size": numbers.pop("prefill_chunk_size", None)}
    cache = CompressedCache(model, KVzip(budget, instructions=INSTRUCTIONS, **numbers), inputs)
    models.generate(model, inputs, 2, past_key_values=cache, **options)
    return cache


MEDIA = [(family, NO_IMAGE if family in models.TEXT_ONLY else ONE_IMAGE) for family in CAUSAL]
MEDIA += [(family, ONE_VIDEO) for family in CAUSAL if family in TINY and TINY[family].video]


@pytest.mark.parametrize(("family", "prompt"), MEDIA, ids=str)
def test_repeating_is_processing_the_prompt_twice(family, prompt, received):
    inputs = models.inputs(family, prompt)
    cache = compressed(family, prompt)
    length = inputs["input_ids"].shape[1]
    attention = attention_of(family, twice(family, inputs))[-len(cache.compressed) :]
    assert len(received) == 1
    for (own,), each in zip(received[0], attention, strict=True):
        assert_close(own, largest(each, length, len(own)), rtol=1e-3, atol=1e-5)


def test_later_chunks_start_with_the_end_of_the_one_before_and_attend_to_the_sinks(received):
    inputs = models.inputs("llama", NO_IMAGE)
    compressed("llama", NO_IMAGE, chunk=9, sinks=3)
    length = inputs["input_ids"].shape[1]
    assert length == 23
    for start, stop, lead, sinks in ((0, 9, 0, 0), (9, 18, 8, 3), (18, 23, 8, 3)):
        ids = INSTRUCTIONS[start > 0]
        attention = attention_of("llama", twice("llama", inputs, slice(start - lead, stop), ids))
        end = length + len(ids) + lead + stop - start
        attended = [*range(sinks), *range(start, stop), *range(length, end)]
        for (own,), each in zip(received[0], attention, strict=True):
            weights = each[:, length:, attended]
            weights = (weights / weights.sum(-1, keepdim=True))[..., sinks : sinks + stop - start]
            brute = weights.unflatten(0, (2, -1)).amax((1, 2))
            assert_close(own[:, start:stop], brute, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "chunk"), [*((family, 23) for family in TINY), ("llava", 2000), ("qwen3_vl", 2000)])
def test_each_prompt_of_a_padded_batch_is_repeated_as_alone(family, chunk, received):
    prompts = [ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER]
    together = compressed(family, *prompts, chunk=chunk)
    for row, prompt in enumerate(prompts):
        model, alone = models.fresh_model(family), models.inputs(family, prompt, seed=row)
        cache = CompressedCache(model, together.recipe, alone)
        models.generate(model, alone, 1, past_key_values=cache)
    batch, *single = received
    for index, layer in enumerate(batch):
        for row, own in enumerate(layer):
            assert_close(own, single[row][index][0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "aya_vision", "minicpmv4_6", "llama"])
def test_a_prompt_in_chunks_is_repeated_as_a_whole(family, received):
    prompts = (NO_IMAGE,) if family in models.TEXT_ONLY else (ONE_IMAGE, THREE_IMAGES)
    for chunk in (None, 13):
        compressed(family, *prompts, prefill_chunk_size=chunk)
    whole, parts = received
    for one, other in zip(whole, parts, strict=True):
        for own, brute in zip(one, other, strict=True):
            assert_close(own, brute, rtol=1e-3, atol=1e-5)


def test_the_instructions_come_from_the_models_tokenizer():
    model, processor = sparsight.load(device="cpu")
    ids = processor.tokenizer("\n\nRepeat the previous context exactly.", add_special_tokens=False)["input_ids"]
    first, later = with_instructions(KVzip(), model.name_or_path).score.instructions
    assert list(first) == ids
    assert len(later) > len(first)
    own = KVzip(instructions=[[1], [2]])
    assert with_instructions(own, "nowhere") == own
    with pytest.raises(ValueError, match=r"there is no tokenizer at '\./nowhere': give the recipe instructions="):
        with_instructions(KVzip(), "./nowhere")


def test_a_bounded_prefill_is_refused():
    with pytest.raises(ValueError, match="'reconstruction' processes the prompt a second time"):
        CompressedCache(
            models.model("llava"), KVzip(instructions=[[1], [2]]), models.inputs("llava", ONE_IMAGE), prefill_bound=2
        )


def test_several_caches_and_beams_share_a_model():
    model, inputs = models.fresh_model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    chosen = KVzip(1.0, instructions=INSTRUCTIONS)
    others = [CompressedCache(model, chosen, inputs) for _ in range(2)]
    for each in others:
        assert torch.equal(
            models.generate(model, inputs, 4, past_key_values=each, num_beams=2),
            models.generate(model, inputs, 4, num_beams=2),
        )
    language = model.get_decoder()
    assert len(language._forward_hooks) == 1
    del each, others
    assert not language._forward_hooks
    assert not language._forward_pre_hooks
