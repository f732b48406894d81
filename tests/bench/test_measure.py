import pytest
import torch
from transformers import DynamicCache

from sparsight import CompressedCache, recipe
from sparsight.bench import measure as module
from sparsight.bench.measure import measure
from sparsight.bench.shapes import random_inputs
from sparsight.cache.prefill import Prefill
from sparsight.engine import model_runner
from tests.bench.conftest import ENTRY
from tests.support import recorder
from tests.support.models import model as tiny_model


@pytest.fixture
def inputs(model):
    return random_inputs(model, 150, 2)


def test_plain_transformers_holds_every_entry(model, inputs):
    sample = measure(model, inputs["input_ids"], DynamicCache(config=model.config), 3)
    assert sample.bytes_held == sample.entry_bytes == 2 * 3 * 2 * 150 * ENTRY
    assert sample.statistics == sample.compaction == 0


@pytest.mark.parametrize("method", ["vl-cache", "elastic", "adakv"])
def test_a_method_holds_its_budget_after_the_prefill(model, inputs, method):
    cache = CompressedCache(model, recipe(method, budget=0.1), inputs)
    sample = measure(model, inputs["input_ids"], cache, 3)
    # Sparsity budgets may be an entry off where they were rounded, in each of three layers.
    assert abs(sample.entry_bytes - 2 * 3 * 2 * 15 * ENTRY) <= (3 * 2 * 2 * ENTRY if method == "vl-cache" else 0)
    assert sample.entry_bytes < sample.bytes_held
    assert cache.report().tokens_seen == 150 + 2


def test_the_full_recipe_holds_as_much_as_plain_transformers(model, inputs):
    cache = CompressedCache(model, recipe("full"), inputs)
    assert measure(model, inputs["input_ids"], cache, 2).entry_bytes == 2 * 3 * 2 * 150 * ENTRY


@pytest.mark.parametrize("family", ["gemma3", "minicpmv4_6"])
def test_layers_that_are_left_alone_count_in_full(family):
    mixed = tiny_model(family)
    prompt = random_inputs(mixed, 150, 1)
    plain = DynamicCache(config=mixed.config.get_text_config())
    cache = CompressedCache(mixed, recipe("full"), prompt)
    held = [measure(mixed, prompt["input_ids"], each, 2).entry_bytes for each in (plain, cache)]
    assert held[0] == held[1] > 0


def test_statistics_and_compaction_are_parts_of_the_first_token(model, inputs):
    sample = measure(model, inputs["input_ids"], CompressedCache(model, recipe("vl-cache"), inputs), 4)
    assert min(sample.statistics, sample.compaction) > 0
    assert sample.statistics + sample.compaction < sample.first_token < sample.end_to_end


def test_measuring_leaves_no_trace_in_the_classes(model, inputs):
    before = [dict(vars(owner)) for owner in (Prefill, CompressedCache)]
    with pytest.raises(ValueError, match="inputs of 150 tokens"):
        measure(model, inputs["input_ids"][:, :1], CompressedCache(model, recipe("vl-cache"), inputs), 2)
    assert [dict(vars(owner)) for owner in (Prefill, CompressedCache)] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures its own graphs")
def test_static_caches_decode_with_a_captured_step(model, inputs, monkeypatch):
    steps = []
    monkeypatch.setattr(model_runner, "capture", lambda step: (steps.append(step), recorder.record(step))[1])
    monkeypatch.setattr(module, "decode_step", model_runner.ModelRunner)
    cache = CompressedCache(model, recipe("elastic", budget=0.1), inputs, max_new_tokens=5)
    sample = measure(model, inputs["input_ids"], cache, 5)
    assert len(steps) == 1
    assert sample.end_to_end > sample.first_token
    # The last of the five tokens is not processed.
    assert cache.report().tokens_seen == 150 + 4
