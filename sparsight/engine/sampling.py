"""How the next token of each sequence is chosen from the logits."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparsight.utils import checks
from sparsight.utils.text import quoted

GREEDY_TEMPERATURE = 1e-5
"""A temperature below it chooses the most likely token."""


class Filters(NamedTuple):
    """The parameters of :class:`SamplingParams` that decide which tokens are drawn from; they are applied in order."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True)
class SamplingParams:
    """How the answers to one request are sampled, and what ends them.

    Logits are processed in the order of transformers: logit bias, repetition penalty, frequency and presence penalty,
    temperature, top-k, top-p, min-p.

    Args:
        max_new_tokens: the longest answer, in tokens.
        temperature: divides the logits; 0 chooses the most likely token.
        top_p: sample from the most likely tokens with this total probability.
        top_k: sample from this many most likely tokens; 0 for all.
        min_p: leave out tokens with less than this fraction of the highest probability.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens of prompt and answer.
        presence_penalty: subtracted from the logits of tokens that the answer has (OpenAI's definition).
        frequency_penalty: subtracted from the logits of tokens as often as the answer has them (OpenAI's definition).
        logit_bias: added to the logits of token ids, from -100 to 100.
        seed: the same seed gives the same tokens, whatever else runs; None for a random one.
        n: number of answers, each with random numbers of its own.
        stop: strings that end the answer; a single one may be given as it is.
        stop_token_ids: token ids that end the answer.
        logprobs: return the log-probability of each token and of this many most likely alternatives; None for neither.
            They are those of the model, before any processing.
        ignore_eos: whether the model's end-of-sequence tokens do not end the answer.

    Raises:
        ValueError: a value is out of range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks.count("max_new_tokens", self.max_new_tokens, least=1)
        checks.at_least("temperature", self.temperature, 0)
        checks.fraction("top_p", self.top_p)
        checks.count("top_k", self.top_k)
        checks.fraction("min_p", self.min_p, zero=True)
        checks.between("repetition_penalty", self.repetition_penalty, 0.01, 10)
        checks.between("presence_penalty", self.presence_penalty, -2, 2)
        checks.between("frequency_penalty", self.frequency_penalty, -2, 2)
        checks.count("n", self.n, least=1)
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number or None, got {quoted(self.seed)}.")
        if self.logprobs is not None:
            checks.count("logprobs", self.logprobs)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers, got {quoted(self.logit_bias)}.")
        for token, bias in self.logit_bias.items():
            checks.count("A token id of logit_bias", token)
            checks.between(f"The logit_bias of token {token}", bias, -100, 100)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not (isinstance(stop, Sequence) and all(isinstance(each, str) and each for each in stop)):
            raise ValueError(f"stop must be a string or strings, none of them empty, got {quoted(self.stop)}.")
        if not isinstance(self.stop_token_ids, Sequence):
            raise ValueError(f"stop_token_ids must be a list of token ids, got {quoted(self.stop_token_ids)}.")
        for token in self.stop_token_ids:
            checks.count("A token id of stop_token_ids", token)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @classmethod
    def from_generation_config(cls, config: GenerationConfig, **requested: Any) -> "SamplingParams":
        """A model's own defaults, with those that are requested in their place.

        What its ``generation_config`` leaves unset is off here; ``model.generate`` would set ``top_k`` to 50.
        """
        names = ["repetition_penalty"]
        if config.do_sample:
            names += ["temperature", "top_p", "top_k", "min_p"]
        own = {name: value for name in names if (value := getattr(config, name)) is not None}
        return cls(**({"temperature": 1.0 if config.do_sample else 0.0} | own | requested))

    def end_token_ids(self, config: GenerationConfig) -> frozenset[int]:
        """Token ids that end an answer: ``stop_token_ids`` and, unless ignored, the model's."""
        eos = [] if self.ignore_eos or config.eos_token_id is None else config.eos_token_id
        return frozenset(self.stop_token_ids).union([eos] if isinstance(eos, int) else eos)


@dataclass(frozen=True)
class Sampled:
    """A token that was chosen.

    Args:
        token_id: the token.
        logprob: its log-probability, if requested.
        top_logprobs: the most likely tokens and their log-probabilities, the most likely first.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The sampling state of one sequence.

    Args:
        params: how the request is sampled.
        prompt_ids: token ids of the prompt, ``[T]`` or ``[1, T]``.
        index: which of the request's ``n`` sequences it is.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Tensor, index: int = 0) -> None:
        self.params = params
        self.random = Random(None if params.seed is None else f"{params.seed}/{index}")
        greedy = params.temperature < GREEDY_TEMPERATURE
        self.filters = None if greedy else Filters(params.temperature, params.top_k, params.top_p, params.min_p)
        self.processors = _processors(params, prompt_ids.numel())
        self._tokens: Any = prompt_ids.reshape(1, -1)

    def process(self, logits: Tensor) -> Tensor:
        """Logits ``[V]`` with bias and penalties, in float32."""
        self._tokens = self._tokens.to(logits.device)
        return self.processors(self._tokens, logits.float()[None])[0]

    def append(self, token: int) -> None:
        """Advance by a token that was chosen; penalties count it from now on."""
        if self.processors:
            self._tokens = torch.cat([self._tokens, self._tokens.new_tensor([[token]])], dim=1)


@torch.no_grad()
def sample(samplers: Sequence[Sampler], logits: Tensor) -> list[Sampled | Exception]:
    """Choose the next token of every sequence, as it would be chosen alone.

    Args:
        samplers: the state of each sequence, which is advanced.
        logits: ``[B, V]``.

    Returns:
        The token of each sequence. A sequence whose logits have a NaN, a +inf or nothing but -inf, or whose
        ``logit_bias`` names a token that the model does not have, gets an exception in place of a token.
    """
    highest, tokens = logits.max(dim=-1)
    errors: dict[int, Exception] = {}
    groups: dict[Filters | None, dict[int, Tensor]] = defaultdict(dict)
    for index, (sampler, value) in enumerate(zip(samplers, highest.tolist(), strict=True)):
        if not math.isfinite(value):
            errors[index] = ValueError(f"The model's highest logit is {value}, so no token can be chosen.")
        elif sampler.processors or sampler.filters:
            try:
                groups[sampler.filters][index] = sampler.process(logits[index])
            except Exception as error:
                errors[index] = error
    for filters, processed in groups.items():
        scores = torch.stack(list(processed.values()))
        if filters is None:
            chosen = scores.argmax(dim=-1)
        else:
            chosen = _draw(_filter(scores, filters), [samplers[index].random.random() for index in processed])
        tokens[list(processed)] = chosen
    alternatives = _alternatives(samplers, logits, tokens)
    results: list[Sampled | Exception] = []
    for index, token in enumerate(tokens.tolist()):
        if index in errors:
            results.append(errors[index])
        else:
            samplers[index].append(token)
            results.append(Sampled(token, *alternatives.get(index, ())))
    return results


def _processors(params: SamplingParams, prompt_length: int) -> LogitsProcessorList:
    """What changes logits by the tokens so far, and applies whatever the temperature."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        bias: Any = {(token,): float(value) for token, value in params.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.frequency_penalty or params.presence_penalty:
        processors.append(FrequencyPenalty(params.frequency_penalty, params.presence_penalty, prompt_length))
    return processors


class FrequencyPenalty(LogitsProcessor):
    """OpenAI's frequency and presence penalties of the tokens that follow a prompt of ``prompt_length`` tokens.

    With ``c`` occurrences of a token in the answer: ``logit - c * frequency - (c > 0) * presence``
    (https://platform.openai.com/docs/advanced-usage).
    """

    def __init__(self, frequency: float, presence: float, prompt_length: int) -> None:
        self.frequency, self.presence, self.prompt_length = frequency, presence, prompt_length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores ``[B, V]`` with the penalties, for token ids ``[B, T]`` of prompt and answer."""
        answer = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def _filter(scores: Tensor, filters: Filters) -> Tensor:
    """Logits ``[B, V]`` divided by the temperature, with -inf for the tokens that are left out."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(filters.temperature))])
    if filters.top_k:
        warpers.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        warpers.append(TopPLogitsWarper(filters.top_p))
    if filters.min_p:
        warpers.append(MinPLogitsWarper(filters.min_p))
    ids: Any = None
    return warpers(ids, scores)


def _draw(scores: Tensor, numbers: Sequence[float]) -> Tensor:
    """Token ids ``[B]``, drawn from logits ``[B, V]`` with one random number of [0, 1) each, by the inverse CDF."""
    cumulative = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = cumulative.new_tensor(numbers)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def _alternatives(
    samplers: Sequence[Sampler], logits: Tensor, tokens: Tensor
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """By index, the log-probability of a sequence's token and the most likely tokens, where they are requested."""
    counts = {index: each.params.logprobs for index, each in enumerate(samplers) if each.params.logprobs is not None}
    if not counts:
        return {}
    indices = list(counts)
    logprobs = logits[indices].float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[indices, None])[:, 0].tolist()
    values, ids = (each.tolist() for each in logprobs.topk(min(max(counts.values()), logits.shape[-1])))
    return {
        index: (own[row], tuple(zip(ids[row], values[row], strict=True))[: counts[index]])
        for row, index in enumerate(indices)
    }
