"""What a handle says is held after each recall."""

import torch

from sparsight import SamplingParams
from tests.engine.requests import Ask, add, engine, inputs_of, recipe_of

ASK = Ask(prompt=0, method="sparsight-recall", budget=0.3, tokens=8)


def recalled(running, **params):
    params = SamplingParams(max_new_tokens=ASK.tokens, **params)
    options = {"inputs": inputs_of("llava", ASK), "recipe": recipe_of("llava", ASK), "params": params}
    return running.add(**options, keep_positions=True)


def test_a_sequence_of_a_batch_is_logged_as_one_that_decodes_alone():
    with engine() as pooled, engine(kv_memory=None) as single:
        # In front of it and behind it, others come and go.
        others = [add(pooled, "llava", Ask(prompt=number, tokens=3 + number)) for number in (1, 2)]
        handles = [recalled(pooled), recalled(single), recalled(pooled, n=2)]
        others.append(add(pooled, "llava", Ask(prompt=3, tokens=4)))
        for handle in (*handles, *others):
            handle.wait()
    logs = [handle.recalled for handle in handles]
    assert [each.token for each in logs[0]] == [1, 5]
    for log in logs[1:]:
        for one, other in zip(logs[0], log, strict=True):
            assert one.token == other.token
            assert torch.equal(one.held, other.held) and torch.equal(one.fetched, other.fetched)
    kept = sum(int((positions >= 0).sum()) for positions in handles[0].kept_positions.values())
    for each in logs[0]:
        assert each.held.shape == (inputs_of("llava", ASK)["input_ids"].shape[1],)
        assert int(each.held.sum()) == kept
        assert (each.fetched <= each.held).all() and int(each.fetched.sum()) > 0


def test_nothing_is_logged_unless_it_is_requested():
    with engine() as running:
        handle = add(running, "llava", ASK)
        handle.wait()
        assert handle.recalled == [] and handle.kept_positions == {}
