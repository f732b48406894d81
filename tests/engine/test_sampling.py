"""Sampling: parameters and their checks, filters, penalties, seeds, log-probabilities and logits without a token."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

from sparsight import SamplingParams
from sparsight.engine.sampling import Sampled, Sampler, sample
from tests.support import models
from tests.support.models import NO_IMAGE

PROMPT = torch.tensor([[3, 5, 5]])
LOGITS = torch.tensor([2.0, 1.0, 0.5, -0.5, -1.0, -3.0])


def sampler(prompt=PROMPT, index=0, **params):
    return Sampler(SamplingParams(**params), prompt, index)


def tokens(one, logits, count):
    """Tokens of consecutive steps with the same logits ``[V]``."""
    return [sample([one], logits[None])[0].token_id for _ in range(count)]


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What is drawn with which probability, from the definitions, by token."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits.tolist())}
    ranked = sorted(weights, key=weights.get, reverse=True)
    if top_k:
        ranked = ranked[:top_k]
    kept, mass, total = [], 0.0, sum(weights[token] for token in ranked)
    for token in ranked:
        if mass < top_p:
            kept.append(token)
        mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.3},
    ],
)
def test_frequencies_are_the_probabilities_of_the_definitions(params):
    count = 20_000
    samplers = [sampler(seed=seed, **params) for seed in range(count)]
    drawn = Counter(each.token_id for each in sample(samplers, LOGITS.expand(count, -1)))
    expected = probabilities(LOGITS, **params)
    assert set(drawn) == set(expected)
    for token, probability in expected.items():
        deviation = math.sqrt(probability * (1 - probability) / count)
        assert abs(drawn[token] / count - probability) <= 4 * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_sequences_take_the_first_of_the_highest_logits(dtype):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, [7, 30]] = 10.0
    results = sample([sampler() for _ in range(4)], logits)
    assert results == [Sampled(token) for token in [7, *logits[1:].argmax(-1).tolist()]]


@pytest.mark.parametrize("temperature", [1e-4, 0.01])
def test_a_low_temperature_takes_the_most_likely_token(temperature):
    assert tokens(sampler(temperature=temperature), 1000 * LOGITS, 20) == [0] * 20


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (math.nextafter(1, 0), 4)])
def test_extreme_random_numbers_draw_no_token_that_was_left_out(number, token):
    one = sampler(temperature=1.0)
    one.random = SimpleNamespace(random=lambda: number)
    assert tokens(one, torch.tensor([-math.inf, 1.0, 1.0, 1.0, 1.1, -math.inf]), 1) == [token]


def test_frequency_and_presence_penalties_count_the_answer_alone():
    # The prompt has 3 and 5, which cost nothing; a token of the answer costs 0.5 once and 0.75 each time.
    one = sampler(frequency_penalty=0.75, presence_penalty=0.5)
    logits, counts, expected = torch.tensor([2.0, 1.0, 0.4, 1.9, -9.0, 0.0]), [0] * 6, []
    for _ in range(12):
        scores = [logit - 0.75 * c - 0.5 * (c > 0) for logit, c in zip(logits.tolist(), counts, strict=True)]
        expected.append(max(range(6), key=scores.__getitem__))
        counts[expected[-1]] += 1
    assert tokens(one, logits, 12) == expected
    assert expected[:4] == [0, 3, 1, 0]


def test_repetition_penalty_counts_the_prompt_too():
    # Token 5 is in the prompt: 3 / 2 is less than 2; token 0 is then in the answer: 2 / 2 is less than 3 / 2.
    logits = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 3.0])
    assert tokens(sampler(repetition_penalty=2.0), logits, 2) == [0, 5]


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"logit_bias": {11: 3, 40: -100}}, {"sequence_bias": {(11,): 3.0, (40,): -100.0}}),
        (
            {"repetition_penalty": 1.3, "logit_bias": {11: 9.0, 12: 9.0}},
            {"repetition_penalty": 1.3, "sequence_bias": {(11,): 9.0, (12,): 9.0}},
        ),
    ],
)
def test_penalties_and_bias_are_those_of_generate(params, options):
    model, inputs = models.model("llama"), models.inputs("llama", NO_IMAGE)
    one, ids = sampler(inputs["input_ids"], **params), inputs["input_ids"]
    for _ in range(12):
        (result,) = sample([one], model(ids).logits[:, -1])
        ids = torch.cat([ids, torch.tensor([[result.token_id]])], dim=1)
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], models.generate(model, inputs, 12, **options))


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs():
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(12, 1, 300, generator=generator)
    params = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.3, "seed": 7}
    alone = sampler(**params)
    expected = [sample([alone], logits)[0] for logits in steps]

    others = [sampler(temperature=1.0, top_p=0.9), sampler(), sampler(temperature=0.3, top_k=5, repetition_penalty=1.2)]
    one = sampler(**params)
    for step, logits in enumerate(steps):
        # Others leave, and the sequence moves within the batch.
        running = others[: 3 - step // 4]
        running.insert(step % (len(running) + 1), one)
        batch = torch.randn(len(running), 300, generator=generator)
        place = running.index(one)
        batch[place] = logits[0]
        assert sample(running, batch)[place] == expected[step]


def test_answers_of_one_request_and_requests_without_a_seed_differ():
    flat = torch.zeros(1000)
    first, second = (tokens(sampler(temperature=1.0, seed=3, index=index), flat, 8) for index in (0, 1))
    assert first == tokens(sampler(temperature=1.0, seed=3), flat, 8)
    assert first != second
    assert tokens(sampler(temperature=1.0, seed=-3), flat, 8) != first
    assert tokens(sampler(temperature=1.0), flat, 8) != tokens(sampler(temperature=1.0), flat, 8)


def test_log_probabilities_are_those_of_the_model_before_processing():
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    logprobs = logits.log_softmax(-1)
    biased = {"temperature": 0.2, "logit_bias": {4: 50.0}}
    results = sample([sampler(**biased, logprobs=2), sampler(), sampler(logprobs=0)], logits)
    assert [each.token_id for each in results] == [4, 5, 0]
    assert_close(results[0].logprob, logprobs[0, 4].item())
    assert [token for token, _ in results[0].top_logprobs] == [0, 1]
    assert_close([value for _, value in results[0].top_logprobs], logprobs[0, :2].tolist())
    assert results[1] == Sampled(5, None, ())
    assert_close(results[2].logprob, logprobs[2, 0].item())
    assert results[2].top_logprobs == ()
    (all_of_them,) = sample([sampler(logprobs=20)], LOGITS[None])
    assert [token for token, _ in all_of_them.top_logprobs] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_p": 0.5, "logprobs": 3, "presence_penalty": 1.0}])
def test_logits_without_a_token_fail_one_sequence_alone(params):
    logits = LOGITS.repeat(5, 1)
    logits[0, 2], logits[1], logits[2, 1] = math.nan, -math.inf, math.inf
    logits[3, 1:] = -math.inf
    results = sample([sampler(seed=1, **params) for _ in range(5)], logits)
    shown = [str(each) for each in results[:3]]
    assert shown == [
        f"The model's highest logit is {value}, so no token can be chosen." for value in ("nan", "-inf", "inf")
    ]
    assert all(isinstance(each, ValueError) for each in results[:3])
    assert results[3].token_id == 0
    assert results[4] == sample([sampler(seed=1, **params)], LOGITS[None])[0]


def test_a_biased_token_that_the_model_does_not_have_fails_one_sequence_alone():
    wrong, right = sample([sampler(logit_bias={6: 1.0}), sampler(logit_bias={5: 100})], LOGITS.repeat(2, 1))
    assert isinstance(wrong, ValueError) and "vocabulary size is 6" in str(wrong) and "[6]" in str(wrong)
    assert right == Sampled(5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a number of at least 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\], got 0.0"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"min_p": 1.5}, r"min_p must be a number in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 10, got 0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be a number from -2 to 2, got 2.5"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be a number from -2 to 2, got '1'"),
        ({"logit_bias": [3]}, r"logit_bias must map token ids to numbers, got \[3\]"),
        ({"logit_bias": {"3": 1}}, "A token id of logit_bias must be a whole number of at least 0, got '3'"),
        ({"logit_bias": {3: math.inf}}, "The logit_bias of token 3 must be a number from -100 to 100, got inf"),
        ({"seed": 1.5}, "seed must be a whole number or None, got 1.5"),
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"stop": 7}, "stop must be a string or strings, none of them empty, got 7"),
        ({"stop": ["a", ""]}, r"stop must be a string or strings, none of them empty, got \['a', ''\]"),
        ({"stop": ["a", 1]}, r"none of them empty, got \['a', 1\]"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids, got 3"),
        ({"stop_token_ids": [-3]}, "A token id of stop_token_ids must be a whole number of at least 0, got -3"),
        ({"logprobs": -1}, "logprobs must be a whole number of at least 0, got -1"),
    ],
)
def test_values_out_of_range_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_containers_are_copied():
    bias, stop, ids = {3: 1.0}, ["a"], [4]
    params = SamplingParams(logit_bias=bias, stop=stop, stop_token_ids=ids)
    for each in (bias, stop, ids):
        each.clear()
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({3: 1.0}, ("a",), (4,))
    assert SamplingParams(stop="ab").stop == ("ab",)


def test_a_models_defaults_stand_in_for_what_is_not_requested():
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert SamplingParams.from_generation_config(config, top_k=3, seed=1) == SamplingParams(
        temperature=0.7, top_p=0.8, top_k=3, repetition_penalty=1.05, seed=1
    )
    assert SamplingParams.from_generation_config(config, temperature=0).temperature == 0
    assert SamplingParams.from_generation_config(GenerationConfig(do_sample=True)) == SamplingParams(temperature=1.0)
    greedy = GenerationConfig(do_sample=False, repetition_penalty=1.1, top_p=0.5)
    assert SamplingParams.from_generation_config(greedy) == SamplingParams(repetition_penalty=1.1)
    assert SamplingParams.from_generation_config(GenerationConfig()) == SamplingParams()


def test_tokens_that_end_an_answer():
    one, several = GenerationConfig(eos_token_id=2), GenerationConfig(eos_token_id=[2, 9])
    params = SamplingParams(stop_token_ids=[4])
    assert params.end_token_ids(one) == {2, 4}
    assert params.end_token_ids(several) == {2, 4, 9}
    assert params.end_token_ids(GenerationConfig()) == {4}
    assert SamplingParams(stop_token_ids=[4], ignore_eos=True).end_token_ids(several) == {4}
    assert SamplingParams(ignore_eos=True).end_token_ids(one) == frozenset()
