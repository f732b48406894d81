"""A snapshot gives every recipe the cache that it would have after a prefill of its own."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparsight import RECIPES, CompressedCache, recipe
from sparsight.cache import layer
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from tests.support import models
from tests.support.models import NO_IMAGE, ONE_IMAGE, THREE_IMAGES
from tests.support.recipes import recipe_for


def prefilled(model, chosen, inputs):
    cache = CompressedCache(model, chosen, inputs)
    models.generate(model, inputs, 1, past_key_values=cache)
    return cache


def continued(inputs, first):
    """Text inputs with a token ``[B, 1]`` after the prompt."""
    return {
        "input_ids": torch.cat([inputs["input_ids"], first], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(first)], dim=1),
    }


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("method", RECIPES)
def test_a_cache_from_a_snapshot_equals_the_cache_of_an_own_prefill(family, method, monkeypatch):
    # The snapshot runs the model's own attention, whose rounding differs from the fused pass.
    monkeypatch.setattr(layer, "is_plain", lambda *_, **__: False)
    model, inputs = models.model(family), models.inputs(family, ONE_IMAGE, THREE_IMAGES)
    snapshot = PrefillSnapshot(model, inputs)
    # Another budget first: the statistics are shared and must not change.
    snapshot.cache(recipe_for(model, method, budget=0.6))
    chosen = recipe_for(model, method, budget=0.3)
    cache, own = snapshot.cache(chosen), prefilled(model, chosen, inputs)
    assert cache.report() == own.report()
    for layer_number in own.report().layers:
        assert torch.equal(cache.kept_positions(layer_number), own.kept_positions(layer_number))
    # The same keys and values give the same logits.
    following = continued(inputs, snapshot.logits.argmax(-1, keepdim=True))
    one, twin = (models.logits(model, following, 1, past_key_values=each)[0] for each in (cache, own))
    assert torch.equal(one, twin)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("method", ["vl-cache", "elastic", "h2o"])
def test_decoding_goes_on_as_after_an_own_prefill(family, method):
    model, inputs = models.model(family), models.inputs(family, ONE_IMAGE, THREE_IMAGES)
    chosen = recipe_for(model, method, budget=0.3)
    snapshot = PrefillSnapshot(model, inputs)
    first = snapshot.logits.argmax(-1, keepdim=True)
    tokens = models.generate(model, continued(inputs, first), 9, past_key_values=snapshot.cache(chosen))
    whole = models.generate(model, inputs, 10, past_key_values=CompressedCache(model, chosen, inputs))
    assert torch.equal(torch.cat([first, tokens], dim=1), whole)


def test_the_logits_are_the_models_own():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, NO_IMAGE)
    assert_close(PrefillSnapshot(model, inputs).logits, models.logits(model, inputs, 1)[0])


def test_the_states_give_the_models_attention():
    eager = models.fresh_model("llava")
    eager.set_attn_implementation({"text_config": "eager"})
    inputs = models.inputs("llava", ONE_IMAGE)
    paid = eager(**inputs, output_attentions=True).attentions
    for states, weights in zip(PrefillSnapshot(models.model("llava"), inputs).states, paid, strict=True):
        key = states.key.repeat_interleave(states.query.shape[1] // states.key.shape[1], dim=1)
        logits = states.query @ key.mT * states.scaling
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        assert_close(logits.masked_fill(~causal, -torch.inf).softmax(-1), weights)


def test_layers_with_a_sliding_window_are_in_the_snapshot():
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(**models.text_config("1:2"), use_sliding_window=True, sliding_window=16, layer_types=layers)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    inputs, chosen = models.inputs("llama", NO_IMAGE, NO_IMAGE), recipe("vl-cache", budget=0.3)
    snapshot = PrefillSnapshot(model, inputs)
    whole = models.generate(model, inputs, 20, past_key_values=CompressedCache(model, chosen, inputs))
    going_on = {"input_ids": torch.cat([inputs["input_ids"], whole[:, :1]], dim=1)}
    going_on["attention_mask"] = torch.ones_like(going_on["input_ids"])
    # Caches of a snapshot do not share state.
    for _ in range(2):
        tokens = models.generate(model, going_on, 19, past_key_values=snapshot.cache(chosen))
        assert torch.equal(tokens, whole[:, 1:])


def test_a_model_keeps_nothing_of_a_snapshot():
    model, inputs = models.fresh_model("llava"), models.inputs("llava", ONE_IMAGE)
    before = model.config.text_config._attn_implementation
    snapshot = PrefillSnapshot(model, inputs)
    snapshot.cache(recipe("vl-cache"))
    del snapshot
    assert model.config.text_config._attn_implementation == before
