"""Static storage: the same tokens as with storage that grows, captured or compiled, and sequences that come and go."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import CompileConfig

from sparsight import CompressedCache, VLCache, recipe
from sparsight.attention import kernels
from sparsight.compression import HeavyHitter, Sliding
from tests.support import recorder
from tests.support.models import (
    NO_IMAGE,
    NO_TEXT_AFTER,
    ONE_IMAGE,
    THREE_IMAGES,
    generate,
    inputs,
    logits,
    model,
)
from tests.support.recipes import STATIC, recipe_for

TOKENS = 24


def made(tiny, name, budget=0.3):
    return recipe_for(tiny, name, **({} if name == "full" else {"budget": budget}))


def both(tiny, chosen, given, tokens=TOKENS, **options):
    """Logits of every token with growing and with static storage, and the two caches."""
    caches = CompressedCache(tiny, chosen, given), CompressedCache(tiny, chosen, given, max_new_tokens=tokens)
    plain, static = (torch.stack(logits(tiny, given, tokens, past_key_values=cache, **options)) for cache in caches)
    return (plain, static), caches


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_tokens_and_entries_are_those_of_growing_storage(name, budget):
    tiny = model("llava")
    given = inputs("llava", THREE_IMAGES, ONE_IMAGE, NO_TEXT_AFTER)
    (plain, static), caches = both(tiny, made(tiny, name, budget), given, 64)
    assert_close(static, plain, rtol=1e-4, atol=1e-4)
    assert plain.argmax(-1).equal(static.argmax(-1))
    reports = [cache.report() for cache in caches]
    assert reports[0].held == reports[1].held
    assert reports[0].tokens_seen == reports[1].tokens_seen
    # Slots differ, what is in them does not.
    for layer, sequences in enumerate(reports[0].held):
        for sequence, heads in enumerate(sequences):
            for head in range(len(heads)):
                one, other = (cache.entries(layer, sequence, head) for cache in caches)
                assert one[0].equal(other[0])
                assert_close(one[1:], other[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vl-cache", "elastic", "adakv"])
def test_other_dtypes_are_as_close_as_they_can_be(name, dtype):
    tiny = model("llava", dtype=dtype)
    given = inputs("llava", ONE_IMAGE, dtype=dtype)
    (plain, static), _ = both(tiny, made(tiny, name), given)
    differ = (plain.argmax(-1) != static.argmax(-1)).flatten()
    same = int(differ.nonzero()[0]) if differ.any() else len(differ)
    # Where the first token flips, it is a near-tie.
    assert_close(static[: same + 1], plain[: same + 1], rtol=0.05, atol=0.3)


@pytest.mark.parametrize(
    "chosen",
    [
        replace(recipe("streaming-llm", budget=0.05), decode=Sliding(sinks=60)),
        replace(recipe("h2o", budget=0.2), decode=HeavyHitter(recent=1.0)),
        replace(recipe("pyramidkv", budget=0.1), decode=Sliding(sinks=4)),
    ],
    ids=["more-sinks-than-entries", "all-are-recent", "fewer-entries-than-allowed"],
)
def test_rows_that_grow_more_than_their_share_find_room(chosen):
    tiny, given = model("llava"), inputs("llava", THREE_IMAGES)
    bound = 1 if chosen.allocate.kind == "pyramid" else None
    caches = [CompressedCache(tiny, chosen, given, room, bound) for room in (None, 64)]
    plain, static = (torch.stack(logits(tiny, given, 64, past_key_values=cache)) for cache in caches)
    assert_close(static, plain, rtol=1e-4, atol=1e-4)
    report = caches[1].report()
    assert report.held == caches[0].report().held
    held = [[len(caches[1].entries(layer, 0, head)[0]) for head in range(2)] for layer in range(len(report.held))]
    assert [layer[0] for layer in report.held] == held


def test_tensors_keep_their_addresses():
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE)
    cache = CompressedCache(tiny, recipe("h2o", budget=0.3), given, max_new_tokens=TOKENS)
    tiny(**given, past_key_values=cache)

    def addresses():
        layers = [(*layer.store.tensors, *layer.eviction.tensors, *layer.step.tensors) for layer in cache.compressed]
        return [tensor.data_ptr() for layer in layers for tensor in layer]

    before = addresses()
    for _ in range(TOKENS - 1):
        tiny(input_ids=given["input_ids"][:, :1], past_key_values=cache)
    assert addresses() == before


def test_a_token_is_written_by_few_operations_where_nothing_is_dropped():
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE, NO_IMAGE)
    cache = CompressedCache(tiny, VLCache(0.3), given, max_new_tokens=TOKENS)
    tiny(**given, past_key_values=cache)
    keys = torch.zeros(2, 2, 1, 16)
    counts = []
    for layer in cache.compressed[:2]:
        with recorder.Recorder() as recorded:
            layer._write(keys, keys)
        # What makes no new tensor and changes none costs a GPU nothing.
        counts.append(sum(not function.is_view for function, *_ in recorded.calls))
    # Keys, values and positions; the first layer plans for all.
    assert counts[1] == 3
    assert counts[0] - counts[1] <= 12


@pytest.mark.parametrize("name", ["vl-cache", "elastic", "h2o"])
def test_what_began_in_inference_mode_goes_on_outside_of_it(name):
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE)
    cache = CompressedCache(tiny, made(tiny, name), given, max_new_tokens=TOKENS)
    token = given["input_ids"][:, :1]
    with torch.inference_mode():
        tiny(**given, past_key_values=cache)
        tiny(input_ids=token, past_key_values=cache)
    with torch.no_grad():
        tiny(input_ids=token, past_key_values=cache)
    assert cache.report().tokens_seen == given["input_ids"].shape[1] + 2


def test_no_more_tokens_than_there_is_room_for():
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE)
    cache = CompressedCache(tiny, VLCache(), given, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="give CompressedCache a larger max_new_tokens"):
        generate(tiny, given, 6, past_key_values=cache)
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1, got 0"):
        CompressedCache(tiny, VLCache(), given, max_new_tokens=0)


@pytest.mark.parametrize("name", ["vl-cache", "elastic", "h2o"])
def test_a_second_turn_is_the_same(name):
    tiny = model("llava")
    first = inputs("llava", ONE_IMAGE)
    answers = []
    for room in (None, TOKENS):
        cache = CompressedCache(tiny, made(tiny, name), first, max_new_tokens=room)
        answer = tiny.generate(**first, past_key_values=cache, max_new_tokens=9, do_sample=False)
        turn = torch.cat([answer, torch.arange(3, 9)[None]], 1)
        both_turns = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        answers.append(tiny.generate(**both_turns, past_key_values=cache, max_new_tokens=TOKENS, do_sample=False))
        assert cache.report().tokens_seen == turn.shape[1] + TOKENS - 1
    assert answers[0].equal(answers[1])


def test_beams_and_candidates_are_the_same():
    tiny, given = model("llava"), inputs("llava", ONE_IMAGE)
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        plain, static = (
            generate(tiny, given, 9, past_key_values=CompressedCache(tiny, VLCache(0.4), given, room), **options)
            for room in (None, 16)
        )
        assert plain.equal(static)


# What records the step


def compiled(**options):
    config = CompileConfig(fullgraph=True, backend="eager", mode=None, **options)
    config._compile_all_devices = True
    return config


@pytest.fixture
def compiles():
    """A fresh compiler, and the number of graphs that it made."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma"])
@pytest.mark.parametrize("name", ["full", "vl-cache", "elastic", "h2o", "adakv"])
def test_generate_compiles_one_graph_for_all_tokens(name, family, compiles, monkeypatch):
    tiny = model(family)
    monkeypatch.delattr(tiny, "_compiled_call", raising=False)
    given = inputs(family, ONE_IMAGE, NO_IMAGE)
    (plain, static), _ = both(tiny, made(tiny, name), given, compile_config=compiled())
    assert_close(static, plain, rtol=1e-4, atol=1e-4)
    assert compiles() == 1


def test_the_kernel_compiles_as_one_operation(compiles, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
    tiny = model("llava")
    monkeypatch.delattr(tiny, "_compiled_call", raising=False)
    given = inputs("llava", ONE_IMAGE, NO_IMAGE)
    plain = logits(tiny, given, 5, past_key_values=CompressedCache(tiny, VLCache(0.3), given))
    if not torch.cuda.is_available():
        # Interpreted, with tensors on the CPU.
        monkeypatch.setattr(kernels, "usable", lambda *states: len(states) == 3)
    cache = CompressedCache(tiny, VLCache(0.3), given, max_new_tokens=5)
    static = logits(tiny, given, 5, past_key_values=cache, compile_config=compiled())
    assert_close(torch.stack(static), torch.stack(plain), rtol=1e-4, atol=1e-4)
    assert compiles() == 1
