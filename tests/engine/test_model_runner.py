"""Decode steps that are recorded once and replayed, with a stand-in for CUDA graphs where there is no GPU."""

from shutil import which

import pytest
import torch
from torch.testing import assert_close
from transformers import TextStreamer

import sparsight
from sparsight import CompressedCache, VLCache
from sparsight.engine import model_runner
from sparsight.engine.generate import capture_options
from sparsight.engine.model_runner import ModelRunner
from tests.engine.requests import Ask, add, engine, generated
from tests.support import recorder
from tests.support.families import TINY
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES, generate, inputs, logits, model
from tests.support.recipes import STATIC, recipe_for

TOKENS = 64
BOUNDED = ("gemma3", "aya_vision", "qwen3_5")
"""Families with layers of a sliding window or of linear attention."""

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records its own graphs")


@pytest.fixture
def recorded(monkeypatch):
    """Record on the CPU, where transformers would compile on a GPU; the steps that were recorded."""
    steps = []

    def record(step):
        steps.append(step)
        return recorder.record(step)

    monkeypatch.setattr(model_runner, "capture", record)
    monkeypatch.setattr(model_runner, "decode_step", ModelRunner)
    monkeypatch.setattr(
        "transformers.generation.GenerationMixin._valid_auto_compile_criteria",
        lambda self, arguments, config: arguments["past_key_values"].is_compileable and not config.disable_compile,
    )
    return steps


def through_steps(tiny, chosen, given, tokens=TOKENS):
    """Logits of an answer whose steps are recorded."""
    cache = CompressedCache(tiny, chosen, given, max_new_tokens=tokens)
    return logits(tiny, given, tokens, past_key_values=cache, **capture_options(cache))


@on_the_cpu
@pytest.mark.parametrize("name", STATIC)
def test_every_method_gives_the_same_tokens_replayed(name, recorded):
    tiny = model("llava")
    given = inputs("llava", ONE_IMAGE, NO_TEXT_AFTER, NO_IMAGE)
    chosen = recipe_for(tiny, name, **({} if name == "full" else {"budget": 0.2}))
    plain = torch.stack(logits(tiny, given, TOKENS, past_key_values=CompressedCache(tiny, chosen, given)))
    replayed = torch.stack(through_steps(tiny, chosen, given))
    assert_close(replayed, plain, rtol=1e-4, atol=1e-4)
    assert plain.argmax(-1).equal(replayed.argmax(-1))
    assert len(recorded) == 1


@on_the_cpu
@pytest.mark.parametrize("family", [name for name in TINY if name not in BOUNDED])
def test_every_family_gives_the_same_tokens_replayed(family, recorded):
    tiny = model(family)
    given = inputs(family, ONE_IMAGE, NO_IMAGE)
    for chosen in (VLCache(0.3), sparsight.ElasticCache(0.3)):
        plain = logits(tiny, given, 9, past_key_values=CompressedCache(tiny, chosen, given))
        assert_close(torch.stack(through_steps(tiny, chosen, given, 9)), torch.stack(plain), rtol=1e-4, atol=1e-4)


@on_the_cpu
@pytest.mark.parametrize("family", [name for name in TINY if name not in BOUNDED])
def test_an_engine_without_a_pool_replays_the_steps_of_each_answer(family, recorded, monkeypatch):
    monkeypatch.setattr(model_runner, "static_capacity", lambda model, tokens: tokens)
    asks = [Ask(0, "vl-cache"), Ask(1, "elastic"), Ask(2, "adakv")]
    with engine(family, kv_memory=None, prefill_chunk=20) as running:
        handles = [add(running, family, ask) for ask in asks]
        assert [handle.wait()[0].token_ids for handle in handles] == [generated(family, ask) for ask in asks]
    assert len(recorded) == 3


@pytest.mark.parametrize("family", [name for name in BOUNDED if name in TINY])
def test_layers_that_are_bounded_already_are_not_recorded(family, recorded):
    tiny, given = model(family), inputs(family, ONE_IMAGE)
    cache = CompressedCache(tiny, VLCache(0.3), given, max_new_tokens=5)
    assert not cache.is_compileable
    plain = generate(tiny, given, 5, past_key_values=CompressedCache(tiny, VLCache(0.3), given))
    assert plain.equal(generate(tiny, given, 5, past_key_values=cache))
    assert not recorded


@on_the_cpu
def test_what_the_host_reads_or_computes_for_each_token_is_noticed(recorded):
    def counting(input_ids, attention_mask):
        return input_ids * int(input_ids.sum())

    def adding(input_ids, attention_mask):
        return input_ids + torch.tensor([[1]])

    for host, reason in ((counting, "read on the host"), (adding, "copied from the host")):
        step = ModelRunner(host)
        step(input_ids=torch.tensor([[3]]))
        with pytest.raises(AssertionError, match=reason):
            step(input_ids=torch.tensor([[3]]))


def test_generate_answers_as_the_model_does_with_a_cache():
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE, NO_IMAGE)
    chosen = VLCache(budget=0.3)
    theirs = tiny.generate(
        **given, past_key_values=CompressedCache(tiny, chosen, given), max_new_tokens=TOKENS, do_sample=False
    )
    ours = sparsight.generate(tiny, given, chosen, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True)
    assert ours.sequences.equal(theirs)
    assert ours.past_key_values.report().method == "vl-cache"


@on_the_cpu
@pytest.mark.skipif(which("g++") is None and which("clang++") is None, reason="torch.compile needs a C++ compiler")
def test_one_compiled_step_answers_all_prompts_of_a_batch_size():
    tiny = model("llava")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for prompt, budget, tokens in ((ONE_IMAGE, 0.3, 9), (THREE_IMAGES, 0.2, 12), (NO_TEXT_AFTER, 0.5, 8)):
        given, chosen = inputs("llava", prompt), VLCache(budget)
        plain, compiled = (
            sparsight.generate(tiny, given, chosen, max_new_tokens=tokens, do_sample=False, compile=compile)
            for compile in (False, True)
        )
        assert plain.equal(compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


@on_the_cpu
def test_without_a_compiler_it_says_so_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler: install g\\+\\+"):
        sparsight.generate(model("llava"), inputs("llava", ONE_IMAGE), VLCache(0.3), compile=True)


class Pieces(TextStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


@on_the_cpu
def test_a_streamer_gets_the_tokens(recorded, monkeypatch):
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE)
    monkeypatch.setattr(model_runner, "static_capacity", lambda model, tokens, compile: tokens)
    streamer = Pieces()
    tokens = sparsight.generate(tiny, given, VLCache(0.3), max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == tokens[0].tolist()
    assert len(recorded) == 1


@on_the_cpu
def test_hidden_states_are_those_of_their_tokens(recorded, monkeypatch):
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE)
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "do_sample": False}
    plain = sparsight.generate(tiny, given, VLCache(0.3), max_new_tokens=6, **options)
    monkeypatch.setattr(model_runner, "static_capacity", lambda model, tokens, compile: tokens)
    fixed = sparsight.generate(tiny, given, VLCache(0.3), max_new_tokens=6, **options)
    for one, other in zip(plain.hidden_states, fixed.hidden_states, strict=True):
        assert_close(one[-1], other[-1], rtol=1e-4, atol=1e-4)


@on_the_cpu
@pytest.mark.parametrize("bound", [None, 2.0])
def test_chunks_of_a_prompt_are_run_as_they_are(bound, recorded, monkeypatch):
    tiny, given = model("llama"), inputs("llama", NO_IMAGE)
    # The model's own would compile them.
    monkeypatch.delattr("transformers.PreTrainedModel.get_compiled_call")
    caches = [CompressedCache(tiny, VLCache(0.3), given, room, bound) for room in (None, 9)]
    plain, replayed = (
        generate(tiny, given, 9, past_key_values=cache, prefill_chunk_size=8, **capture_options(cache))
        for cache in caches
    )
    assert plain.equal(replayed)
    assert len(recorded) == 1
