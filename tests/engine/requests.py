"""Requests to an engine with a tiny model, and the answers that they get alone."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch

from sparsight import CompressedCache, Engine, SamplingParams
from tests.support import models
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES, generate
from tests.support.processors import tokenizer
from tests.support.recipes import recipe_for

PROMPTS = [ONE_IMAGE, THREE_IMAGES, NO_IMAGE, NO_TEXT_AFTER]
TINY_BUDGET = 1e-6
PROCESSOR = SimpleNamespace(tokenizer=tokenizer(), chat_template=None, image_token="<image>")
"""The tokens of a tiny model are letters; its prompts are prepared."""


class Ask(NamedTuple):
    """A prompt, how it is compressed and how long the answer is."""

    prompt: int = 0
    method: str = "vl-cache"
    budget: float = 0.3
    tokens: int = 6


def recipe_of(family, ask):
    return recipe_for(models.model(family), ask.method, **({} if ask.method == "full" else {"budget": ask.budget}))


def inputs_of(family, ask):
    return models.inputs(family, PROMPTS[ask.prompt], seed=ask.prompt)


def engine(family="llava", **options):
    return Engine(models.model(family), PROCESSOR, **({"kv_memory": 2**22} | options))


def add(running, family, ask, **params):
    """The handle of a request."""
    params = SamplingParams(**({"max_new_tokens": ask.tokens} | params))
    return running.add(inputs=inputs_of(family, ask), recipe=recipe_of(family, ask), params=params)


@functools.cache
def generated(family, ask):
    """Greedy tokens of ``model.generate``."""
    model, inputs = models.model(family), inputs_of(family, ask)
    cache = CompressedCache(model, recipe_of(family, ask), inputs)
    return generate(model, inputs, ask.tokens, past_key_values=cache)[0].tolist()


@functools.cache
def alone(family, ask, **params):
    """Tokens and text of each answer on an engine of its own."""
    with engine(family) as fresh:
        return [(each.token_ids, each.text) for each in add(fresh, family, ask, **params).wait()]


def text_of(tokens):
    return PROCESSOR.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(tokens, stop):
    """The tokens up to the one that completes a stop string, and the text before it."""
    for count in range(1, len(tokens) + 1):
        text = text_of(tokens[:count])
        if stop in text:
            return tokens[:count], text[: text.index(stop)], "stop"
    return tokens, text_of(tokens), "length"


def check_books(running):
    """No slot of the pool has two owners or none, and exactly the running sequences have slots."""
    batch = running._batch
    assert len(batch.members) == len(running._running)
    if batch.pool is None:
        return
    extents = batch.pool.extents
    assert sorted(extents) == sorted(member.start for member in batch.members)
    owned = [slot for start, count in extents.items() for slot in range(start, start + count)]
    free = [slot for start, count in batch.pool._free for slot in range(start, start + count)]
    assert sorted(owned + free) == list(range(batch.pool.slots))


def check_empty(running):
    """Everything has been returned."""
    check_books(running)
    assert not running.busy
    if running._batch.pool:
        assert running._batch.pool.free_slots == running._batch.pool.slots
        assert len(running._batch.pool._free) == 1


def break_once(monkeypatch, model, error, when=lambda arguments: True):
    """Let the next call of ``model`` for which ``when`` holds raise ``error``."""
    pending = [error]
    forward = type(model).forward

    @functools.wraps(forward)
    def broken(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        if self is model and pending and when(options):
            raise pending.pop()
        return output

    monkeypatch.setattr(type(model), "forward", broken)
    return pending


def is_decode(options):
    return options["input_ids"].shape[1] == 1


@torch.no_grad()
def spoil(monkeypatch, model, sequence):
    """NaN in one sequence's logits of every decode step of several."""
    forward = type(model).forward

    @functools.wraps(forward)
    def spoiled(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        if self is model and is_decode(options) and len(output.logits) > 1:
            output.logits[sequence] = torch.nan
        return output

    monkeypatch.setattr(type(model), "forward", spoiled)
