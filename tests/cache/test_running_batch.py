"""Sequences that join and leave a running batch decode as each does alone, whatever runs beside them."""

import functools
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight import RECIPES, CompressedCache
from sparsight.attention import kernels
from sparsight.cache import running_batch
from sparsight.cache.running_batch import RunningBatch
from sparsight.engine.positions import decode_positions, prompt_positions
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES, inputs, model
from tests.support.recipes import recipe_for

TOKENS = 12
POOL_BYTES = 2**20
PROMPTS = [ONE_IMAGE, THREE_IMAGES, NO_IMAGE, NO_TEXT_AFTER]
TINY_BUDGET = 1e-6
"""One entry of each row stays."""


class Spec(NamedTuple):
    """A prompt and how it is compressed."""

    prompt: int
    method: str
    budget: float


class Alone(NamedTuple):
    """What a sequence does without others: its tokens, and the logits and the cache before each of them."""

    tokens: list[int]
    logits: list[torch.Tensor]
    caches: list[CompressedCache]
    position: int


@functools.cache
@torch.no_grad()
def alone(spec, family="llava", heads="1:2", dtype=torch.float32):
    tiny, given_inputs = (
        model(family, heads, dtype),
        inputs(family, PROMPTS[spec.prompt], seed=spec.prompt, dtype=dtype),
    )
    budget = {} if spec.method == "full" else {"budget": spec.budget}
    cache = CompressedCache(tiny, recipe_for(tiny, spec.method, **budget), given_inputs)
    positions, position = prompt_positions(tiny, given_inputs)
    logits = [tiny(**given_inputs, position_ids=positions, past_key_values=cache).logits[0, -1]]
    caches, tokens = [deepcopy(cache)], [int(logits[0].argmax())]
    for step in range(TOKENS):
        logits.append(forward(tiny, cache, [tokens[-1]], [position + step])[0])
        tokens.append(int(logits[-1].argmax()))
        caches.append(deepcopy(cache))
    return Alone(tokens, logits, caches, position)


def forward(tiny, cache, tokens, positions):
    """Logits ``[B, V]`` of one token of each sequence."""
    positions = decode_positions(tiny, torch.tensor(positions))
    mask = torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool) if isinstance(cache, RunningBatch) else None
    given_ids = torch.tensor(tokens)[:, None]
    return tiny(input_ids=given_ids, position_ids=positions, attention_mask=mask, past_key_values=cache).logits[:, -1]


class Schedule:
    """A running batch beside what its sequences do alone."""

    def __init__(self, family="llava", heads="1:2", dtype=torch.float32):
        self.kind = family, heads, dtype
        self.model = model(*self.kind)
        self.batch = RunningBatch(self.model, POOL_BYTES)
        self.running = []
        self.close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}

    def join(self, spec):
        """Bring in a sequence; it must fit."""
        expected = alone(spec, *self.kind)
        place = self.batch.join(deepcopy(expected.caches[0]), TOKENS)
        assert place is not None
        self.running.insert(place, (expected, 0))

    def leave(self, index):
        self.batch.leave(index)
        del self.running[index]

    @torch.no_grad()
    def step(self):
        """A token of every sequence; those that are complete leave."""
        tokens = [expected.tokens[done] for expected, done in self.running]
        positions = [expected.position + done for expected, done in self.running]
        self.batch.advance()
        logits = forward(self.model, self.batch, tokens, positions)
        self.running = [(expected, done + 1) for expected, done in self.running]
        for index, (expected, done) in enumerate(self.running):
            assert_close(logits[index], expected.logits[done], **self.close)
            if self.kind[2] == torch.float32:
                assert int(logits[index].argmax()) == expected.tokens[done]
        self.check_entries()
        for index in reversed(range(len(self.running))):
            if self.running[index][1] == TOKENS:
                self.leave(index)

    def check_entries(self):
        """Every row holds the entries that it holds alone, in its own part of the pool."""
        pool = self.batch.pool
        owned = []
        for member, (expected, done) in zip(self.batch.members, self.running, strict=True):
            cache = expected.caches[done]
            for layer, rows in enumerate(zip(member.starts, member.capacities, strict=True)):
                for head, (start, capacity) in enumerate(zip(*rows, strict=True)):
                    owned += range(start, start + capacity)
                    positions = pool.positions[start : start + capacity]
                    slots = start + positions.argsort()[(positions == -1).sum() :]
                    held, keys, values = cache.entries(layer, 0, head)
                    assert pool.positions[slots].tolist() == held.tolist()
                    assert_close(pool.keys[slots], keys, **self.close)
                    assert_close(pool.values[slots], values, **self.close)
        assert len(set(owned)) == len(owned) == pool.slots - pool.free_slots

    def run(self):
        """To the end, after which nothing is left in the pool."""
        while self.running:
            self.step()
        if self.batch.pool:
            assert self.batch.pool.free_slots == self.batch.pool.slots


SPECS = st.builds(
    Spec, st.integers(0, len(PROMPTS) - 1), st.sampled_from(list(RECIPES)), st.sampled_from([1.0, 0.3, TINY_BUDGET])
)
EVENTS = st.lists(st.one_of(SPECS, st.just("step"), st.tuples(st.just("leave"), st.integers(0, 9))), max_size=14)


def follow(schedule, events):
    for event in events:
        if isinstance(event, Spec):
            schedule.join(event)
        elif schedule.running:
            schedule.step() if event == "step" else schedule.leave(event[1] % len(schedule.running))
    schedule.run()


@settings(max_examples=25, deadline=None)
@given(EVENTS)
def test_sequences_of_any_method_and_length_come_and_go(events):
    follow(Schedule(), events)


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_beside_others(method):
    schedule = Schedule()
    for prompt, budget in enumerate([0.3, 1.0, TINY_BUDGET, 0.3]):
        schedule.join(Spec(prompt, method, budget))
        schedule.join(Spec(0, "adakv", 0.3))
        schedule.step()
        schedule.leave(0)
    schedule.run()


MIXED = [Spec(0, "vl-cache", 0.3), Spec(1, "adakv", 0.3), Spec(2, "full", 1.0), Spec(3, "h2o", 0.3)]
MIXED += [Spec(0, "elastic", TINY_BUDGET), Spec(1, "streaming-llm", 0.3)]


@pytest.mark.parametrize("heads", ["1:1", "1:2", "1:8"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "paligemma"])
def test_families_and_groups_of_query_heads(family, heads):
    schedule = Schedule(family, heads)
    for spec in MIXED:
        schedule.join(spec)
        schedule.step()
    schedule.leave(1)
    schedule.run()


@pytest.mark.parametrize("heads", ["1:1", "1:8"])
def test_copies_of_short_rows_give_what_each_run_does(heads, monkeypatch):
    monkeypatch.setattr(running_batch, "FEW_CALLS", 0)
    schedule = Schedule(heads=heads)
    for spec in [each for each in MIXED if each.method != "h2o"]:
        schedule.join(spec)
        assert schedule.batch._tiled
        schedule.step()
    schedule.leave(1)
    schedule.run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_it_can_be(dtype):
    schedule = Schedule(dtype=dtype)
    # Of entries whose scores tie in half precision, H2O may drop another one.
    for spec in [each for each in MIXED if each.method != "h2o"]:
        schedule.join(spec)
        schedule.step()
    schedule.run()


def test_the_kernel_reads_the_rows_of_all_sequences(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
    schedule = Schedule()
    kinds = [Spec(0, "vl-cache", 0.3), Spec(3, "adakv", 0.3), Spec(2, "h2o", 0.3)]
    for spec in kinds:
        alone(spec)
    if not torch.cuda.is_available():
        # Interpreted, with tensors on the CPU.
        monkeypatch.setattr(kernels, "usable", lambda *states: len(states) == 3)
    for spec in kinds:
        schedule.join(spec)
    schedule.step()
    schedule.leave(1)
    schedule.step()


def test_a_sequence_for_which_there_is_no_gap_does_not_join():
    schedule, small = Schedule(), Spec(0, "vl-cache", 0.3)
    schedule.join(small)
    rest = schedule.batch.pool.allocate(schedule.batch.pool.free_slots)
    assert schedule.batch.join(deepcopy(alone(small).caches[0]), TOKENS) is None
    assert len(schedule.batch.members) == 1
    schedule.batch.pool.free(rest)
    schedule.run()
