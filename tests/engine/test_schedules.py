"""The engine: every request gets what it gets alone, whatever else comes and goes."""

import asyncio
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparsight import RECIPES, RequestError
from tests.engine.requests import (
    PROMPTS,
    TINY_BUDGET,
    Ask,
    add,
    alone,
    check_books,
    check_empty,
    cut,
    engine,
    generated,
    inputs_of,
    text_of,
)
from tests.support.families import TINY
from tests.support.models import TEXT_ONLY

LONGEST = 10
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


@pytest.mark.parametrize(("share", "steps"), [(5, 1), (4, 2)])
def test_a_short_rest_of_a_prompt_is_processed_with_its_last_chunk(share, steps):
    ask = Ask(tokens=1)
    length = inputs_of("llava", ask)["input_ids"].shape[1]
    with engine(prefill_chunk=length - length // share) as running:
        handle = add(running, "llava", ask)
        assert [running.step() for _ in range(steps)] == [True] * (steps - 1) + [False]
        assert handle.wait()[0].token_ids == generated("llava", ask)


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


def test_a_prompt_to_recall_from_counts_in_the_memory_for_it():
    recalling = Ask(1, "sparsight-recall")
    plain = bytes_of(recalling._replace(method="sparsight"))
    with engine(kv_memory=plain + 4_000) as running:
        with pytest.raises(RequestError, match=r"may need [\d,]+ bytes of KV memory"):
            add(running, "llava", recalling).wait()
        check_empty(running)
    with engine(kv_memory=plain + 4_000, host_memory=1_000) as running:
        message = r"recall from a prompt of [\d,]+ bytes, and the engine has 1,000 bytes of host memory: give"
        with pytest.raises(RequestError, match=message):
            add(running, "llava", recalling).wait()
        check_empty(running)
    with engine(kv_memory=plain + 4_000, host_memory=2**20) as running:
        assert add(running, "llava", recalling).wait()[0].token_ids == generated("llava", recalling)
        check_empty(running)


@pytest.mark.parametrize("host_memory", [0, 130_000])
def test_answers_that_recall_wait_for_memory_and_share_their_prompt(host_memory):
    asks = [Ask(number % 4, "sparsight-recall" if number % 3 else "vl-cache") for number in range(12)]
    limits = {"host_memory": host_memory} if host_memory else {"kv_memory": 250_000}
    with engine(**limits) as running:
        handles = [add(running, "llava", ask, n=1 + number % 2) for number, ask in enumerate(asks)]
        most = 0
        while running.step():
            copied = {}
            for each in [*running._ready, *running._running]:
                copied[id(each.handle)] = each.copied_bytes
            total, kv = sum(copied.values()), running.stats.kv_bytes
            kept = running.prefixes.nbytes if running.prefixes else 0
            assert running.stats.host_bytes == total + kept
            assert total <= host_memory if host_memory else total + kv <= 250_000
            # Prompts that are held for others leave the rest of the memory.
            assert kept + running.prefixes.reserved <= host_memory if host_memory else not kept
            most = max(most, len(copied))
        assert 1 < most < len(asks)
        for handle, ask in zip(handles, asks, strict=True):
            assert {each.token_ids == generated("llava", ask) for each in handle.wait()} == {True}
        assert running.stats.host_bytes == (running.prefixes.nbytes if running.prefixes else 0)


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
