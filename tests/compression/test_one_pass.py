"""Where every query matters, one pass gives the prompt's attention and the statistics."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from sparsight import CompressedCache, ElasticCache, VLCache, recipe
from sparsight.cache import layer
from sparsight.compression import SparsityAware
from tests.support import models
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES, generate

BATCH = (ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER)
RECIPES = [ElasticCache(budget=0.2), recipe("h2o", budget=0.2)]


@pytest.fixture
def own_attention(monkeypatch):
    """A log of the calls of the models' own attention during prefill."""
    calls = []

    def logged(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    original = layer.own_attention
    monkeypatch.setattr(layer, "own_attention", logged)
    return calls


def both(model, inputs, chosen, tokens, own_attention, monkeypatch, **options):
    """Caches and logits of one pass, then of two."""
    results = []
    for one_pass in (True, False):
        cache = CompressedCache(model, chosen, inputs)
        with monkeypatch.context() as patch:
            if not one_pass:
                patch.setattr(layer, "is_plain", lambda *_, **__: False)
            own_attention.clear()
            logits = models.logits(model, inputs, tokens, past_key_values=cache, **options)
        assert bool(own_attention) != one_pass
        results.append((cache, logits))
    return results


def check_same_answer(first, second, tolerance=1e-4):
    """Tokens are the same up to a near-tie, and so far logits are near each other."""
    for own, other in zip(first, second, strict=True):
        assert_close(own, other, rtol=tolerance, atol=tolerance)
        if not torch.equal(own.argmax(-1), other.argmax(-1)):
            break


@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "in parts"])
@pytest.mark.parametrize("prompts", [(THREE_IMAGES,), BATCH], ids=["alone", "padded batch"])
@pytest.mark.parametrize("heads", ["1:1", "1:8"])
@pytest.mark.parametrize("chosen", RECIPES, ids=lambda chosen: chosen.name)
def test_64_tokens_are_those_of_two_passes(chosen, heads, prompts, chunk, own_attention, monkeypatch):
    family, options = "llava", {}
    if chunk:
        family, options = "llama", {"prefill_chunk_size": chunk}
        prompts = [models.Prompt(0, 20 + 9 * prompt.images, 10) for prompt in prompts]
    model, inputs = models.model(family, heads), models.inputs(family, *prompts)
    (one, logits), (two, expected) = both(model, inputs, chosen, 64, own_attention, monkeypatch, **options)
    check_same_answer(logits, expected)
    for index in range(3):
        assert torch.equal(*(cache.kept_positions(index) for cache in (one, two)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_first_token_in_half_precision_is_the_models_own(family, dtype):
    model, inputs = models.model(family, "1:2", dtype), models.inputs(family, *BATCH, dtype=dtype)
    cache = CompressedCache(model, RECIPES[0], inputs)
    own, full = models.logits(model, inputs, 1, past_key_values=cache)[0], models.logits(model, inputs, 1)[0]
    exact_model = models.model(family, "1:2")
    exact = models.logits(exact_model, models.inputs(family, *BATCH), 1)[0]
    assert (own - exact).abs().mean() < 1.5 * (full - exact).abs().mean()


def test_sparsity_of_the_last_queries_comes_from_the_same_pass(own_attention, monkeypatch):
    chosen = replace(VLCache(budget=0.2).combined(score="accumulated"), allocate=SparsityAware(threshold=0.1))
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH, NO_IMAGE)
    (one, logits), (two, expected) = both(model, inputs, chosen, 8, own_attention, monkeypatch)
    assert_close(torch.tensor(one.report().sparsity), torch.tensor(two.report().sparsity), rtol=0, atol=1e-6)
    assert one.report().kept == two.report().kept
    check_same_answer(logits, expected)


@pytest.mark.parametrize(
    ("family", "prompt"), [("paligemma", ONE_IMAGE), ("llava", ONE_IMAGE)], ids=["prefix seen whole", "causal"]
)
def test_where_tokens_see_later_ones_the_models_own_attention_does_the_prefill(family, prompt, own_attention):
    model, inputs = models.model(family), models.inputs(family, prompt)
    generate(model, inputs, 2, past_key_values=CompressedCache(model, RECIPES[0], inputs))
    assert bool(own_attention) == (family == "paligemma")


def test_a_mask_that_hides_earlier_tokens_is_left_to_the_models_own_attention(own_attention):
    model, inputs = models.model("llama"), models.inputs("llama", models.Prompt(0, 10, 10))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., 15:18, 3:7] = False
    cache = CompressedCache(model, RECIPES[0], inputs)
    with torch.no_grad():
        output = model(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache)
        expected = model(input_ids=inputs["input_ids"], attention_mask=mask)
    assert len(own_attention) == 3
    assert_close(output.logits, expected.logits)


@pytest.mark.parametrize("projection", ["q_proj", "v_proj"])
def test_gradients_flow_through_the_models_own_attention(projection, own_attention):
    model, inputs = models.fresh_model("llama"), models.inputs("llama", models.Prompt(0, 10, 10))
    model.requires_grad_(False)
    weight = getattr(model.model.layers[2].self_attn, projection).weight.requires_grad_(True)
    output = model(**inputs, past_key_values=CompressedCache(model, RECIPES[0], inputs))
    output.logits.sum().backward()
    # The layers before it need no gradient.
    assert len(own_attention) == 1
    assert weight.grad.abs().sum() > 0
