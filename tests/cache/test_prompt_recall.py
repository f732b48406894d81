"""Recall while decoding: what rows hold, and what an answer is."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import sparsight
from sparsight import CompressedCache, VLCache, recipe
from sparsight.cache.dense_store import DenseStore
from sparsight.cache.prompt_recall import PromptRecall
from sparsight.cache.ragged_store import RaggedStore
from sparsight.compression import BlockBounds, Evict, Exact, LowRank, Recall
from sparsight.eval.collate import conversations
from sparsight.eval.tasks import task
from tests.support import models
from tests.support.models import NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES, generate

BATCH = (ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER)
INDEXES = [Exact(), BlockBounds(4), LowRank(4, 4)]
WITHOUT = recipe("sparsight-recall", budget=0.2).combined(decode="grow")
HEAD_WISE = recipe("adakv", budget=0.2).combined(decode="recall")


def full_states(model, inputs):
    """Keys and values of plain transformers' cache, ``[B, H_kv, T, D]`` by layer."""
    cache = DynamicCache()
    generate(model, inputs, 1, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 30),
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=2),
    ragged=st.booleans(),
    first=st.integers(0, 5),
    added=st.integers(0, 20),
    rounds=st.integers(1, 3),
    prior=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 999),
)
def test_each_head_holds_what_was_chosen_and_all_of_the_answer(
    length, counts, ragged, first, added, rounds, prior, seed
):
    generator = torch.Generator().manual_seed(seed)
    counts = [min(count, length) for count in (counts if ragged else counts[:1] * 2)]
    keys, values = (torch.randn(2, length, size, generator=generator) for size in (4, 3))
    like = keys[None], values[None]
    # A sequence in front, whose rows must not change.
    kind = RaggedStore if ragged else DenseStore
    store = kind.allocate([3, 3, *counts], keys[None].repeat(2, 1, 1, 1), values[None].repeat(2, 1, 1, 1))
    store.fill(0, torch.ones(2, 3, 4), torch.ones(2, 3, 3), torch.tensor([[0, 1, 2]] * 2))
    for head, count in enumerate(counts):
        held = torch.randperm(length, generator=generator)[:count].sort().values
        store.fill(2 + head, keys[head, None, held], values[head, None, held], held[None] + first)
    store.append(*(torch.full((2, 2, added, each.shape[-1]), 7.0) for each in like), first + length)
    score = torch.rand(2, length, generator=generator)
    rule = Recall(pool=1, prior=prior)
    recall = PromptRecall(rule, Evict(), lambda: (keys, values), keys, [], first, first + length, counts, score)
    for _ in range(rounds):
        query = torch.randn(4, 4, generator=generator)
        chosen = recall.chosen(query, 0.5)
        recall.fetch(query, None, store.flat(), store.starts[2:])
        assert chosen.sum(-1).tolist() == counts
        for head in range(2):
            expected = [first + j for j in range(length) if chosen[head, j]]
            positions, own_keys, own_values = store.entries(2 + head)
            assert positions.tolist() == expected + list(range(first + length, first + length + added))
            places = positions[: counts[head]].long() - first
            assert torch.equal(own_keys[: counts[head]], keys[head, places])
            assert torch.equal(own_values[: counts[head]], values[head, places])
            assert (own_keys[counts[head] :] == 7).all()
            start = int(store.starts[head])
            assert (store.flat()[0][start : start + 3] == 1).all()


@pytest.mark.parametrize(
    "chosen", [recipe("sparsight-recall", budget=0.2, every=2), HEAD_WISE], ids=lambda one: one.name
)
def test_entries_held_are_those_of_the_full_cache_and_change_when_it_is_time(chosen):
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH)
    cache = CompressedCache(model, chosen, inputs)
    generate(model, inputs, 1, past_key_values=cache)
    kept = cache.report().kept
    length, held = cache.prompt.length, [cache.kept_positions(2)]
    for step in range(1, 9):
        token = torch.full((3, 1), 5 + step)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, step)], 1)
        with torch.no_grad():
            model(input_ids=token, attention_mask=mask, past_key_values=cache)
        held.append(cache.kept_positions(2))
    changed = [not torch.equal(*pair) for pair in pairwise(held)]
    every = chosen.decode.every
    assert any(changed)
    assert all(number % every == 0 for number, change in enumerate(changed) if change)
    # As many of the prompt as ever, and all of the answer.
    assert [[[count + 8 for count in heads] for heads in layer] for layer in kept] == cache.report().held
    for index, states in enumerate(full_states(model, inputs)):
        for sequence in range(3):
            for head in range(2):
                positions, keys, values = cache.entries(index, sequence, head)
                own = positions < length
                for entries, full in zip((keys, values), states, strict=True):
                    expected = full[sequence, head, positions[own].long()]
                    torch.testing.assert_close(entries[own], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: index.kind)
def test_recall_for_every_token_with_room_for_all_is_the_full_cache(index):
    for family in models.FAMILIES:
        model, inputs = models.model(family), models.inputs(family, *BATCH)
        cache = CompressedCache(model, recipe("sparsight-recall", budget=1.0, every=1, index=index), inputs)
        assert torch.equal(generate(model, inputs, 20, past_key_values=cache), generate(model, inputs, 20))


def test_a_list_is_read_out_at_a_twentieth_as_with_the_full_cache():
    model, processor = sparsight.load()
    example = task("transcribe:8").example(0, 0)
    (inputs,) = [conversations(processor, [example], model.device, model.dtype).inputs]
    answers = [
        model.generate(**inputs, past_key_values=CompressedCache(model, chosen, inputs), max_new_tokens=120)
        for chosen in (recipe("full"), *(recipe(name, budget=0.05) for name in ("sparsight-recall", "sparsight")))
    ]
    assert answers[0].tolist() == answers[1].tolist()
    assert answers[0].tolist() != answers[2].tolist()


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: index.kind)
def test_the_report_counts_what_the_ranking_needs_and_the_host_copy(index):
    model, inputs = models.model("llava"), models.inputs("llava", THREE_IMAGES)
    caches = [
        CompressedCache(model, chosen, inputs)
        for chosen in (WITHOUT, recipe("sparsight-recall", budget=0.2, index=index))
    ]
    for cache in caches:
        generate(model, inputs, 4, past_key_values=cache)
    plain, recalling = (cache.report() for cache in caches)
    heads = [host.states(layer)[0] for host in caches[1].host for layer in range(3)]
    # The index, the score of each key, and which positions always stay.
    numbers = sum(keys[..., 0].numel() * keys.element_size() + keys.shape[1] for keys in heads)
    ranking = numbers + sum(each.nbytes for keys in heads for each in index.build(keys))
    assert recalling.bytes_held == plain.bytes_held + (ranking if index.resident else 0)
    assert recalling.held == plain.held
    assert plain.host_bytes == 0
    assert recalling.host_bytes == recalling.full_bytes // recalling.tokens_seen * recalling.prompt_tokens[0]


def test_beams_recall_each_for_itself():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    chosen = recipe("sparsight-recall", budget=1.0, every=1)
    cache = CompressedCache(model, chosen, inputs)
    answer = generate(model, inputs, 8, past_key_values=cache, num_beams=3)
    assert torch.equal(answer, generate(model, inputs, 8, num_beams=3))


def test_a_copy_goes_its_own_way():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = CompressedCache(model, recipe("sparsight-recall", budget=0.2), inputs)
    with torch.inference_mode():
        generate(model, inputs, 1, past_key_values=cache)
    branch, before = copy.deepcopy(cache), cache.kept_positions(0)
    mask = torch.ones(1, cache.prompt.length + 1)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=branch)
    assert torch.equal(cache.kept_positions(0), before)
    assert not torch.equal(branch.kept_positions(0), before)
    assert branch.host[0] is cache.host[0]


def test_storage_grows_where_it_would_be_static():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    chosen = recipe("sparsight-recall", budget=0.2)
    static = CompressedCache(model, chosen, inputs, max_new_tokens=12)
    assert not static.is_compileable
    answers = [
        generate(model, inputs, 12, past_key_values=each) for each in (static, CompressedCache(model, chosen, inputs))
    ]
    assert torch.equal(*answers)


def test_what_does_not_go_with_recall_is_refused():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    chosen = VLCache(budget=0.2).combined(decode="recall")
    with pytest.raises(ValueError, match="fetches entries back from the full prompt, all of which must be held"):
        CompressedCache(model, chosen, inputs, prefill_bound=2)
    with pytest.raises(ValueError, match="'recall' overwrites entries"):
        generate(model, inputs, 5, past_key_values=CompressedCache(model, chosen, inputs), prompt_lookup_num_tokens=3)
