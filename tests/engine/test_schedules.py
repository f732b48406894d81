"""The engine: every request gets what it gets alone, whatever else comes, goes or fails."""

import asyncio
import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image

import sparsight
from sparsight import RECIPES, Engine, RequestError, SamplingParams
from tests.engine.requests import (
    PROMPTS,
    TINY_BUDGET,
    Ask,
    add,
    alone,
    break_once,
    check_books,
    check_empty,
    cut,
    engine,
    generated,
    inputs_of,
    is_decode,
    recipe_of,
    spoil,
    text_of,
)
from tests.support.families import TINY
from tests.support.models import TEXT_ONLY, fresh_model, model

LONGEST = 10
SHORT = Ask()
ASKS = st.builds(
    Ask,
    st.integers(0, len(PROMPTS) - 1),
    st.sampled_from(list(RECIPES)),
    st.sampled_from([1.0, 0.3, TINY_BUDGET]),
    st.integers(1, LONGEST),
)


class Schedules(RuleBasedStateMachine):
    """Requests that come and go in any order."""

    @initialize(
        chunk=st.sampled_from([None, 2, 7, 30]), kv_memory=st.sampled_from([2**17, 2**22]), most=st.integers(3, 8)
    )
    def start(self, chunk, kv_memory, most):
        self.engine = engine(prefill_chunk=chunk, kv_memory=kv_memory, max_running=most)
        self.checks = []
        self.handles = []

    def begin(self, check, ask, **params):
        handle = add(self.engine, "llava", ask, **params)
        self.handles.append(handle)
        self.checks.append((handle, check))

    @rule(ask=ASKS)
    def greedy(self, ask):
        expected = generated("llava", ask._replace(tokens=LONGEST))[: ask.tokens]
        self.begin(lambda answers: [(expected, text_of(expected), "length")], ask)

    @rule(ask=ASKS, place=st.integers(0, LONGEST - 1), length=st.integers(1, 2))
    def stopped_by_a_string(self, ask, place, length):
        text = text_of(generated("llava", ask._replace(tokens=LONGEST)))
        stop = text[place : place + length] or "~"
        expected = cut(generated("llava", ask._replace(tokens=LONGEST))[: ask.tokens], stop)
        if "\ufffd" not in stop:
            self.begin(lambda answers: [expected], ask, stop=stop)

    @rule(ask=ASKS, place=st.integers(0, LONGEST - 1))
    def stopped_by_a_token(self, ask, place):
        tokens = generated("llava", ask._replace(tokens=LONGEST))
        end = tokens.index(tokens[place]) + 1
        reason = "stop" if end <= ask.tokens else "length"
        expected = tokens[: min(end, ask.tokens)], text_of(tokens[: min(end - 1, ask.tokens)]), reason
        self.begin(lambda answers: [expected], ask, stop_token_ids=(tokens[place],))

    @rule(ask=ASKS, seed=st.integers(0, 3), number=st.integers(1, 3), penalty=st.sampled_from([0.0, 1.0]))
    def sampled(self, ask, seed, number, penalty):
        params = {"temperature": 1.5, "top_p": 0.9, "seed": seed, "frequency_penalty": penalty}
        # The answers to one prompt do not depend on how many there are, nor on where they end.
        expected = [
            (tokens[: ask.tokens], text_of(tokens[: ask.tokens]), "length")
            for tokens, _ in alone("llava", ask._replace(tokens=LONGEST), n=3, **params)[:number]
        ]
        self.begin(lambda answers: expected, ask, n=number, **params)

    @rule()
    def step(self):
        self.engine.step()

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def abort(self, data):
        handle = data.draw(st.sampled_from(self.handles))
        self.engine.abort(handle)
        self.engine.step()
        assert handle.done
        self.handles.remove(handle)

    @invariant()
    def books_balance(self):
        if hasattr(self, "engine"):
            check_books(self.engine)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.step():
            check_books(self.engine)
            steps += 1
            assert steps < 2000
        for handle, check in self.checks:
            assert handle.done
            if handle.error:
                assert "aborted" in str(handle.error) or "bytes of KV memory" in str(handle.error)
                continue
            for answer, (tokens, text, reason) in zip(handle.wait(), check(None), strict=True):
                if answer.finish_reason == "aborted":
                    assert handle not in self.handles
                    assert answer.token_ids == tokens[: len(answer.tokens)]
                else:
                    assert (answer.token_ids, answer.text, answer.finish_reason) == (tokens, text, reason)
        check_empty(self.engine)
        self.engine.close()


Schedules.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestSchedules = Schedules.TestCase


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("family", [*TINY, *TEXT_ONLY])
def test_every_family(family, chunk):
    """Those with sliding-window or linear layers decode on their own."""
    prompts = range(3) if family in TINY else [2]
    with engine(family, prefill_chunk=chunk) as running:
        handles = {ask: add(running, family, ask) for ask in [Ask(prompt) for prompt in prompts]}
        several = add(running, family, Ask(2), n=2, temperature=1.0, seed=5)
        same = add(running, family, Ask(2, tokens=4), n=2)
        for ask, handle in handles.items():
            (answer,) = handle.wait()
            assert answer.token_ids == generated(family, ask)
        expected = alone(family, Ask(2), n=2, temperature=1.0, seed=5)
        assert [(each.token_ids, each.text) for each in several.wait()] == expected
        assert [each.token_ids for each in same.wait()] == [generated(family, Ask(2))[:4]] * 2
        running.run()
        check_empty(running)


@pytest.mark.parametrize("method", RECIPES)
def test_every_method(method):
    asks = [Ask(prompt, method, budget) for prompt in range(4) for budget in (0.3, TINY_BUDGET)]
    with engine(prefill_chunk=20) as running:
        handles = [add(running, "llava", ask) for ask in asks]
        for ask, handle in zip(asks, handles, strict=True):
            assert handle.wait()[0].token_ids == generated("llava", ask)
        check_empty(running)


def test_pieces_are_the_answer():
    ask = Ask(tokens=9)
    with engine() as running:
        handle = add(running, "llava", ask, n=2, temperature=1.0, seed=1, logprobs=2)
        pieces = list(handle)
        answers = handle.wait()
    for index, answer in enumerate(answers):
        own = [piece for piece in pieces if piece.answer == index]
        assert "".join(piece.text for piece in own) == answer.text
        assert tuple(piece.token for piece in own if piece.token) == answer.tokens
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in answer.tokens)
        assert answer.report.prompt_tokens == [inputs_of("llava", ask)["input_ids"].shape[1]]


def test_defaults_are_the_models_own():
    built = fresh_model("llava")
    tokens = generated("llava", Ask(tokens=10))
    built.generation_config.eos_token_id = tokens[3]
    with Engine(built, engine().processor, recipe_of("llava", Ask())) as running:
        (answer,) = running.add(inputs=inputs_of("llava", Ask())).wait()
    assert answer.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert answer.finish_reason == "stop"


def test_what_began_in_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        running = engine()
        handles = [add(running, "llava", Ask(method=method)) for method in ("h2o", "vl-cache")]
        for _ in range(3):
            running.step()
    running.run()
    assert [handle.wait()[0].token_ids for handle in handles] == [
        generated("llava", Ask(method=method)) for method in ("h2o", "vl-cache")
    ]


# Messages and images


@pytest.fixture(scope="module")
def reader():
    return sparsight.load()


@pytest.fixture(scope="module")
def page():
    return Image.open("examples/receipt-1.png")


def test_questions_conversations_and_inputs_are_the_same(reader, page):
    text = "How much is JU?"
    messages = [{"role": "user", "content": [{"type": "image", "image": page}, {"type": "text", "text": text}]}]
    inputs = reader[1].apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with Engine(*reader, "sparsight") as running:
        handles = [
            running.add(text, [page]),
            running.add(text, ["examples/receipt-1.png"]),
            running.add(messages=messages),
            running.add(inputs=inputs),
        ]
        assert [handle.wait()[0].text for handle in handles] == ["461"] * 4


def test_an_image_that_breaks_the_processor_ends_its_request_alone(reader, page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    with Engine(*reader, "sparsight") as running:
        good = running.add("How much is JU?", [page])
        bad = [
            running.add("How much is JU?", [broken]),
            running.add("How much is JU?", [tmp_path / "missing.png"]),
            running.add("How much is JU?", [Image.new("RGB", (1, 4000))]),
            running.add("How much is </s>?", [page]),
            running.add(messages=[{"role": "user", "content": [{"type": "image", "image": object()}]}]),
        ]
        for handle in bad:
            with pytest.raises(RequestError) as error:
                handle.wait()
            assert str(error.value).endswith(".")
            assert "\n" not in str(error.value)
        assert good.wait()[0].text == "461"


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


# Memory and order


def bytes_of(*asks):
    """KV memory that some requests take together."""
    with engine() as running:
        for ask in asks:
            add(running, "llava", ask)
        while running._waiting or running._prompt or running._ready:
            running.step()
        return sum(each.kv_bytes for each in running._running)


def test_a_request_that_can_never_fit_is_refused_in_one_sentence():
    with engine(kv_memory=20_000) as running:
        large, small = Ask(1, "full", tokens=1000), Ask(0)
        handles = [add(running, "llava", ask) for ask in (large, small)]
        with pytest.raises(RequestError, match=r"may need [\d,]+ bytes of KV memory, and the engine has 20,000: give"):
            handles[0].wait()
        assert handles[1].wait()[0].token_ids == generated("llava", small)
        check_empty(running)


def test_what_does_not_fit_now_waits_in_order():
    ask = Ask(1, tokens=12)
    with engine(kv_memory=2 * bytes_of(ask) + 2_000) as running:
        handles = [add(running, "llava", ask) for _ in range(5)]
        # A small one behind them does not overtake.
        handles.append(add(running, "llava", Ask(2, budget=TINY_BUDGET, tokens=2)))
        begun = []
        while running.step():
            check_books(running)
            assert len(running._running) <= 3
            begun += [handle for handle in handles if handle.has_news and handle not in begun]
        assert begun == handles
        for handle in handles[:5]:
            assert handle.wait()[0].token_ids == generated("llava", ask)
        check_empty(running)


def test_no_more_answers_than_allowed_run_together():
    with engine(max_running=3) as running:
        handles = [add(running, "llava", Ask(prompt % 3), n=number) for prompt, number in enumerate([2, 2, 1, 3, 1])]
        while running.step():
            assert len(running._running) + len(running._ready) <= 3
        assert [len(handle.wait()) for handle in handles] == [2, 2, 1, 3, 1]


def test_after_many_small_requests_nothing_is_left():
    with engine(kv_memory=2**17, max_running=16) as running:
        handles = []
        for index in range(300):
            ask = Ask(index % 4, ["vl-cache", "adakv", "full"][index % 3], tokens=1 + index % 5)
            handles.append((ask, add(running, "llava", ask)))
            if index % 3 == 0:
                running.step()
        running.run()
        for ask, handle in handles:
            assert handle.wait()[0].token_ids == generated("llava", ask._replace(tokens=5))[: ask.tokens]
        check_empty(running)


# Threads and coroutines


def test_several_threads_read_their_own_answers():
    asks = [Ask(index % 4, tokens=5 + index) for index in range(6)]
    expected = [generated("llava", ask) for ask in asks]
    answers = [None] * len(asks)

    def ask_and_read(index):
        handle = add(running, "llava", asks[index])
        tokens = [piece.token.token_id for piece in handle if piece.token]
        answers[index] = tokens, handle.wait()[0].token_ids

    with engine() as running:
        threads = [threading.Thread(target=ask_and_read, args=[index]) for index in range(len(asks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check_empty(running)
    assert answers == [(tokens, tokens) for tokens in expected]


def test_requests_are_added_while_another_thread_steps():
    stop = threading.Event()
    with engine() as running:

        def drive():
            while not stop.is_set():
                running.step()

        thread = threading.Thread(target=drive)
        thread.start()
        handles = [add(running, "llava", Ask(index % 4)) for index in range(40)]
        for handle in handles[::3]:
            running.abort(handle)
        while not all(handle.done for handle in handles):
            time.sleep(0.001)
        stop.set()
        thread.join()
        for index, handle in enumerate(handles):
            if index % 3:
                assert [piece.token.token_id for piece in handle if piece.token] == generated("llava", Ask(index % 4))
        check_empty(running)


def test_close_while_threads_read_and_add():
    running = engine()
    ended = []

    def read(index):
        try:
            while True:
                add(running, "llava", Ask(index, tokens=50)).wait()
        except (RequestError, ValueError) as error:
            ended.append(str(error))

    threads = [threading.Thread(target=read, args=[index]) for index in range(3)]
    for thread in threads:
        thread.start()
    while not running._running:
        time.sleep(0.001)
    running.close()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(ended) == 3
    check_empty(running)


def test_answers_are_read_asynchronously():
    asks = [Ask(index, tokens=5 + index) for index in range(4)]

    async def read(handle):
        return [piece.token.token_id async for piece in handle if piece.token]

    async def everything():
        handles = [add(running, "llava", ask) for ask in asks]
        return await asyncio.gather(*map(read, handles))

    with engine() as running:
        assert asyncio.run(everything()) == [generated("llava", ask) for ask in asks]
        check_empty(running)
