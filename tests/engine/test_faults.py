"""A request that fails or is aborted ends alone, and returns its memory."""

import gc
from random import Random

import pytest
import torch

from sparsight import Engine, RequestError, SamplingParams
from tests.engine.requests import (
    Ask,
    add,
    break_once,
    check_books,
    check_empty,
    engine,
    generated,
    inputs_of,
    is_decode,
    spoil,
    text_of,
)
from tests.support.models import model

SHORT = Ask()


# What is wrong with one request


@pytest.mark.parametrize(
    "stop", [3, [3], [""], "", [None]], ids=["number", "numbers", "empty-of-several", "empty", "none-of-several"]
)
def test_a_stop_string_that_is_no_string_is_refused_at_once(stop):
    with pytest.raises(ValueError, match="stop must be a string or strings, none of them empty"):
        SamplingParams(stop=stop)


def refused(match, family="llava", changed=None, ask=SHORT, **params):
    """A request fails in one sentence, and the one beside it does not."""
    with engine() as running:
        handle = running.add(
            inputs=inputs_of(family, ask) | (changed or {}), params=SamplingParams(max_new_tokens=ask.tokens, **params)
        )
        other = add(running, "llava", Ask())
        with pytest.raises(RequestError, match=match):
            handle.wait()
        assert other.wait()[0].token_ids == generated("llava", Ask())
        check_empty(running)


def test_prompts_that_cannot_be_processed_are_refused():
    long = torch.ones(1, 2050, dtype=torch.long)
    refused("The prompt has 2,050 tokens and the answer may have 6, but", changed={"input_ids": long})
    refused("The prompt has 31 tokens and the answer may have 5,000", ask=Ask(tokens=5000))
    refused("NaN|nan", changed={"pixel_values": torch.full((1, 3, 28, 28), torch.nan)})
    refused("image", changed={"pixel_values": torch.zeros(2, 3, 28, 28)})
    two = torch.ones(2, 9, dtype=torch.long)
    refused("one prompt", changed={"input_ids": two, "attention_mask": two}, ask=Ask(2))
    refused("token", logit_bias={10**6: 1.0})


def test_inputs_without_tokens_are_refused():
    with engine() as running, pytest.raises(RequestError, match="input_ids"):
        running.add(inputs={"pixel_values": torch.zeros(1, 3, 28, 28)}).wait()


def test_arguments_are_checked_at_once():
    with engine(max_running=2) as running:
        for arguments in ({}, {"prompt": "a", "inputs": {}}, {"messages": [], "inputs": {}}):
            with pytest.raises(ValueError, match="A request has one of prompt, messages and inputs"):
                running.add(**arguments)
        with pytest.raises(ValueError, match="n must be at most the engine's max_running, 2, got 3"):
            running.add("a", params=SamplingParams(n=3))
        with pytest.raises(ValueError, match="recipe must be a Recipe"):
            running.add("a", recipe=0.1)
        with pytest.raises(ValueError, match="images must be a list"):
            running.add("What?", "a.png")
        with pytest.raises(ValueError, match="images belong to a prompt"):
            running.add(inputs=inputs_of("llava", Ask()), images=["a.png"])
    with pytest.raises(ValueError, match="The engine is closed"):
        running.add("a")
    for memory in (0, -1, float("nan"), "1GB"):
        with pytest.raises(ValueError, match="kv_memory must be"):
            engine(kv_memory=memory)
    with pytest.raises(ValueError, match="prefill_chunk must be a whole number of at least 2"):
        engine(prefill_chunk=1)
    with pytest.raises(ValueError, match="vision_bytes must be a whole number of at least 0, got -1"):
        Engine(model("llava"), None, vision_bytes=-1)
    with pytest.raises(ValueError, match="prefill_bound must be a number of at least 1, got 0"):
        Engine(model("llava"), None, prefill_bound=0.5)
    with pytest.raises(ValueError, match="'merge-nearest' merges"):
        Engine(model("llava"), None, recipe="elastic", prefill_bound=2)
    with pytest.raises(ValueError, match="model must be a loaded transformers model, got a str"):
        Engine("llava", None)


@pytest.mark.parametrize("sequence", [0, 1, 2])
def test_nan_in_one_answer_ends_it_alone(sequence, monkeypatch):
    asks = [Ask(prompt, tokens=8) for prompt in range(3)]
    expected = [generated("llava", ask) for ask in asks]
    with engine() as running:
        handles = [add(running, "llava", ask) for ask in asks]
        for _ in range(3):
            running.step()
        spoil(monkeypatch, model("llava"), sequence)
        running.step()
        monkeypatch.undo()
        for index, handle in enumerate(handles):
            if index == sequence:
                with pytest.raises(RequestError, match="highest logit is nan"):
                    handle.wait()
            else:
                assert handle.wait()[0].token_ids == expected[index]
        check_empty(running)


@pytest.mark.parametrize("method", ["vl-cache", "adakv", "elastic", "h2o"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "host"],
)
def test_out_of_memory_in_a_step_ends_the_youngest(error, method, monkeypatch):
    asks = [Ask(prompt, method, tokens=8) for prompt in range(3)]
    expected = [generated("llava", ask) for ask in asks]
    with engine() as running:
        handles = [add(running, "llava", ask) for ask in asks]
        for _ in range(3):
            running.step()
        pending = break_once(monkeypatch, model("llava"), error, is_decode)
        running.step()
        assert not pending
        check_books(running)
        with pytest.raises(RequestError, match=r"^There is not enough memory for the request\.$"):
            handles[2].wait()
        assert [handle.wait()[0].token_ids for handle in handles[:2]] == expected[:2]
        check_empty(running)


def test_any_other_error_in_a_step_ends_no_more_than_the_youngest(monkeypatch):
    with engine() as running:
        handles = [add(running, "llava", Ask(prompt)) for prompt in range(2)]
        for _ in range(2):
            running.step()
        break_once(monkeypatch, model("llava"), IndexError("index 7 is out of range"), is_decode)
        running.run()
        with pytest.raises(RequestError, match="index 7 is out of range"):
            handles[1].wait()
        assert handles[0].wait()[0].token_ids == generated("llava", Ask(0))
        check_empty(running)


def test_out_of_memory_in_a_prompt_ends_its_request(monkeypatch):
    with engine(prefill_chunk=7) as running:
        first = add(running, "llava", Ask(tokens=20))
        running.step()
        second = add(running, "llava", Ask(1))
        while not running._running:
            running.step()
        break_once(monkeypatch, model("llava"), torch.OutOfMemoryError("x"), lambda options: not is_decode(options))
        with pytest.raises(RequestError, match="not enough memory"):
            second.wait()
        assert first.wait()[0].token_ids == generated("llava", Ask(tokens=20))
        check_empty(running)


def test_out_of_memory_when_the_pool_is_made_ends_the_request(monkeypatch):
    with engine() as running:
        with monkeypatch.context() as patch:
            patch.setattr("sparsight.cache.kv_pool.zeros", lambda *_: (_ for _ in ()).throw(MemoryError()))
            handles = [add(running, "llava", Ask()), add(running, "llava", Ask(1), n=2)]
            for handle in handles:
                with pytest.raises(RequestError, match="not enough memory"):
                    handle.wait()
        assert add(running, "llava", Ask()).wait()[0].token_ids == generated("llava", Ask())
        check_empty(running)


@pytest.mark.parametrize("number", [1, 2])
def test_a_tokenizer_that_fails_ends_the_request(number, monkeypatch):
    with engine() as running:
        handles = [add(running, "llava", Ask(0), n=number), add(running, "llava", Ask(1))]
        for _ in range(3):
            running.step()
        for sequence in running._running[:number]:
            monkeypatch.setattr(sequence._stream, "push", lambda token: 1 / 0)
            monkeypatch.setattr(sequence._stream, "finish", lambda: 1 / 0)
        with pytest.raises(RequestError, match="division by zero"):
            handles[0].wait()
        assert handles[1].wait()[0].token_ids == generated("llava", Ask(1))
        check_empty(running)


# Abort and close


def test_an_aborted_answer_keeps_its_text_and_its_memory_is_free_after_a_step():
    ask = Ask(tokens=20)
    with engine() as running:
        aborted, other = (add(running, "llava", ask, **params) for params in ({"n": 2}, {}))
        for _ in range(4):
            running.step()
        assert len(running._batch.members) == 3
        running.abort(aborted)
        running.step()
        check_books(running)
        assert len(running._batch.members) == 1
        for answer in aborted.wait():
            assert answer.finish_reason == "aborted"
            assert answer.token_ids == generated("llava", ask)[: len(answer.tokens)]
            assert len(answer.tokens) >= 3
            assert answer.text == text_of(answer.token_ids)
        assert other.wait()[0].token_ids == generated("llava", ask)
        check_empty(running)


def test_requests_that_wait_or_are_being_processed_can_be_aborted():
    with engine(prefill_chunk=7) as running:
        handles = [add(running, "llava", Ask(prompt)) for prompt in range(3)]
        running.step()
        assert running._prompt
        for handle in handles[:2]:
            running.abort(handle)
        running.step()
        for handle in handles[:2]:
            with pytest.raises(RequestError, match="aborted before its prompt was processed"):
                handle.wait()
        assert handles[2].wait()[0].token_ids == generated("llava", Ask(2))
        running.abort(handles[2])
        assert handles[2].wait()[0].finish_reason == "length"
        check_empty(running)


def test_close_ends_everything():
    running = engine(prefill_chunk=20)
    handles = [add(running, "llava", Ask(tokens=30)), add(running, "llava", Ask(1)), add(running, "llava", Ask(2))]
    while not running._running:
        running.step()
    running.step()
    running.close()
    check_empty(running)
    assert handles[0].wait()[0].finish_reason == "aborted"
    for handle in handles[1:]:
        with pytest.raises(RequestError, match="aborted"):
            handle.wait()
    running.close()
    assert not running.step()


# Memory


def live_bytes():
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_after_two_thousand_requests_no_tensor_is_left():
    random = Random(0)
    tallies = []
    with engine(max_running=16) as running:
        for number in range(2000):
            # The vision cache and the pool have all they will ever have after the first requests.
            if number in (100, 1999):
                running.run()
                check_empty(running)
                tallies.append(live_bytes())
            ask = Ask(random.randrange(4), random.choice(["vl-cache", "adakv", "h2o"]), tokens=random.randint(1, 4))
            handle = add(running, "llava", ask)
            if number % 10 == 0:
                running.abort(handle)
            running.step()
            if number % 10 == 5:
                running.abort(handle)
            while running.waiting > 8:
                running.step()
    assert tallies[1] <= tallies[0] + 4096
