"""Queries are rotated back to what they were before RoPE, and ahead to the positions that the model will give."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AttentionInterface

from sparsight import CompressedCache, recipe
from sparsight.attention.rope import Rope, newest_valid
from sparsight.cache.prefill import Prefill
from tests.support import models
from tests.support.families import TINY
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES

EVERY = [*TINY, *models.TEXT_ONLY]
ATTENDED = {}


def prompts_of(family):
    return (
        (NO_IMAGE, models.Prompt(0, 1, 0)) if family in models.TEXT_ONLY else (ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER)
    )


def note_query(module, query, key, value, mask, **kwargs):
    ATTENDED[module.layer_idx] = query
    return torch.zeros_like(query).transpose(1, 2), None


def query_before_rope(module, arguments):
    """What a module's own forward gives the attention function when every token is at angle 0."""
    AttentionInterface.register("note_query", note_query)
    own, module.config._attn_implementation_internal = module.config._attn_implementation, "note_query"
    cos, sin = arguments["position_embeddings"]
    try:
        module(
            **arguments
            | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin)), "past_key_values": None}
        )
    finally:
        module.config._attn_implementation_internal = own
    return ATTENDED[module.layer_idx]


class Calls:
    """Arguments of the attention modules of some layers in each forward pass, and how their queries were undone."""

    def __init__(self, monkeypatch, model, layers):
        self.modules, self.arguments, self.undone = [], [], []
        self.handles = []
        for module in model.get_decoder().modules():
            if getattr(module, "layer_idx", None) in layers and hasattr(module, "o_proj"):
                self.handles.append(module.register_forward_pre_hook(self.note, with_kwargs=True))
        observe = Prefill.observe

        def noted(prefill, query, *rest, **others):
            spans = prefill.prompt.spans
            self.undone.append([prefill.rotation.undo(query[b], b, slice(None)) for b in range(len(spans))])
            observe(prefill, query, *rest, **others)

        monkeypatch.setattr(Prefill, "observe", noted)

    def note(self, module, args, kwargs):
        assert not args
        self.modules.append(module)
        self.arguments.append(kwargs)


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_undone_queries_are_those_of_the_model_without_positions(family, monkeypatch):
    model, inputs = models.fresh_model(family), models.inputs(family, *prompts_of(family))
    cache = CompressedCache(model, recipe("expected-attention", budget=0.3), inputs)
    calls = Calls(monkeypatch, model, [index for index, layer in enumerate(cache.layers) if layer in cache.compressed])
    models.generate(model, inputs, 1, past_key_values=cache)
    assert len(calls.undone) == len(cache.compressed) == len(calls.modules)
    for handle in calls.handles:
        handle.remove()
    for module, arguments, undone in zip(calls.modules, calls.arguments, calls.undone, strict=True):
        for span, own, brute in zip(cache.prompt.spans, undone, query_before_rope(module, arguments), strict=True):
            valid = slice(span.start, span.stop)
            assert_close(own[:, valid], brute[:, valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_ahead_is_where_the_model_goes_on(family, monkeypatch):
    model, inputs = models.fresh_model(family), models.inputs(family, *prompts_of(family))
    cache = CompressedCache(model, recipe("expected-attention", budget=1.0), inputs)
    ropes = []
    compact = CompressedCache._compact
    monkeypatch.setattr(CompressedCache, "_compact", lambda self: (ropes.append(self._rope), compact(self)))
    embeddings = []
    layer = cache.compressed[0]
    index = cache.layers.index(layer)
    for module in model.get_decoder().modules():
        if getattr(module, "layer_idx", None) == index and hasattr(module, "o_proj"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: embeddings.append(kwargs["position_embeddings"]), with_kwargs=True
            )
    models.generate(model, inputs, 4, past_key_values=cache)
    decoded = embeddings[1:]
    assert len(decoded) == 3
    # After a prompt that ends in an image, generate goes on from the axes of its last patch, not from the largest.
    sequences = range(2 if family in TINY else len(cache.prompt.spans))
    for b in sequences:
        for count in (1, 2, 3):
            for ahead, each in zip(ropes[0].ahead(b, count), zip(*decoded, strict=True), strict=True):
                steps = torch.stack([step[min(b, len(step) - 1)] for step in each[:count]])
                assert_close(ahead[0], steps.mean(0), rtol=1e-5, atol=1e-5)


def test_scaled_cosines_and_sines_are_undone():
    model = models.model("llama")
    rope = Rope(model.model, torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool), None)
    rope.newest = tuple(1.7 * each for each in rope.newest)
    rotation = rope.of(model.model.layers[0].self_attn)
    query = torch.randn(4, 5, 16)
    rotated = rotation.apply(query[None], query[None], *rope.newest)[0][0]
    assert_close(rotation.undo(rotated, 0, slice(None)), query)


def test_padding_and_what_follows_the_prompt_have_no_position():
    valid = torch.tensor([[False, True, True], [True, True, True]])
    assert newest_valid(valid, 1, 4).tolist() == [[True, True, False, False]] * 2
    language = models.model("llama").model
    first = Rope(language, torch.tensor([[9, 0], [0, 1]]), newest_valid(valid, 0, 2), None)
    then = Rope(language, torch.tensor([[1, 2], [2, 3]]), newest_valid(valid, 2, 2), first)
    assert first.last.tolist() == [0, 1]
    assert then.last.tolist() == [1, 2]


def test_a_model_without_rope_is_refused():
    module = torch.nn.Linear(2, 2)
    module.config = models.model("llama").config
    rope = Rope(module, torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="Linear does not rotate queries by RoPE"):
        rope.of(module)
