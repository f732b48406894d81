"""Compaction frees the full cache layer by layer, and does not wait for the device in every layer."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from transformers import LlamaConfig, LlamaForCausalLM

from sparsight import CompressedCache, recipe
from sparsight.cache.layer import CompressedLayer
from tests.support.families import text_config
from tests.support.memory import PeakMemory

LENGTH = 900
WAITING = (
    "cpu",
    "item",
    "tolist",
    "numpy",
    "nonzero",
    "bincount",
    "unique",
    "equal",
    "__bool__",
    "__int__",
    "__float__",
)
"""Functions of tensors whose results only the device knows; copies wait too, unless they are told not to."""


def prompt(layers):
    """A model of so many layers, and inputs with a picture."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**text_config("1:2"), "num_hidden_layers": layers})).eval()
    types = torch.zeros(1, LENGTH, dtype=torch.long)
    types[:, 20:-30] = 1
    return model, {"input_ids": torch.randint(1, 90, (1, LENGTH)), "mm_token_type_ids": types}


def prefill(model, inputs, chosen):
    cache = CompressedCache(model, chosen, inputs)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"], past_key_values=cache, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("name", ["vl-cache", "elastic", "h2o", "adakv", "prefixkv"])
def test_the_full_cache_is_freed_layer_by_layer(name, monkeypatch):
    model, inputs = prompt(6)
    memory, alive, full = PeakMemory(), [], []
    compact_all, compact_one = CompressedCache._compact, CompressedLayer.compact

    def counted(cache):
        for layer in cache.compressed:
            for states in (layer.prefill.keys, layer.prefill.values):
                memory.count(states.untyped_storage())
        full.append(memory.live)
        with memory:
            compact_all(cache)

    def one_counted(layer, *arguments):
        compact_one(layer, *arguments)
        alive.append(memory.live)

    monkeypatch.setattr(CompressedCache, "_compact", counted)
    monkeypatch.setattr(CompressedLayer, "compact", one_counted)
    cache = prefill(model, inputs, recipe(name, budget=0.1))
    assert full == [cache.report().full_bytes]
    layer = full[0] / 6
    held = [one.nbytes for one in cache.compressed]
    for index, live in enumerate(alive):
        # The model itself still holds the keys and values of the layer that it is in, the last one. Scores count too.
        left = max(6 - index - 1, 1)
        assert live <= left * layer + sum(held[: index + 1]) + 0.25 * layer
    assert memory.peak <= full[0] + layer


class Waits(TorchFunctionMode):
    """Counts calls that wait for the device, if that is not the CPU."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or "").rpartition(".")[2]
        masks = [index for index in (args[1:2] if name == "__getitem__" else ()) if isinstance(index, torch.Tensor)]
        by_mask = any(mask.dtype == torch.bool for mask in masks)
        copied = name == "to" and not isinstance(args[1], torch.dtype) and not (kwargs or {}).get("non_blocking")
        if name in WAITING or by_mask or copied:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name",
    # Not AirCache: its elite are as many as the attention says, in every layer.
    ["vl-cache", "elastic", "h2o", "streaming-llm", "snapkv", "pyramidkv", "prefixkv", "look-m", "adakv", "sparsight"],
)
def test_compaction_waits_for_the_device_as_often_for_many_layers_as_for_few(name, monkeypatch):
    compact_all = CompressedCache._compact
    counts = []

    def counted(cache):
        with Waits() as waits:
            compact_all(cache)
        counts.append(waits.calls)

    monkeypatch.setattr(CompressedCache, "_compact", counted)
    for layers in (2, 5):
        model, inputs = prompt(layers)
        prefill(model, inputs, recipe(name, budget=0.1))
    assert counts[0] == counts[1]
    if name == "vl-cache":
        # One copy of all counts; the rest is about tensors that are on the CPU anyway.
        assert counts[0]["cpu"] == 1
