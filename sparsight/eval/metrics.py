"""Metrics of one answer, and how they are aggregated over many: pure functions and a table of the metrics."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

INSTALL = "pip install 'sparsight[eval]'"


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer equals the reference, except for leading and trailing whitespace; else 0."""
    return float(answer.strip() == reference.strip())


def anls(answer: str, reference: str) -> float:
    """Average normalised Levenshtein similarity with threshold 0.5, in ``[0, 1]``, the metric of DocVQA.

    Biten et al.: Scene Text Visual Question Answering, ICCV 2019; computed by ``anls_star``.

    Raises:
        ValueError: the library is not installed.
    """
    return float(_anls_score()(reference, answer))


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, in ``[0, 1]``; computed by ``rouge_score``.

    Lin: ROUGE: A Package for Automatic Evaluation of Summaries, 2004.

    Raises:
        ValueError: the library is not installed.
    """
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


def same_tokens(one: Sequence[int], other: Sequence[int]) -> float:
    """Number of positions with equal tokens over the length of the longer answer; 1 for two empty answers."""
    equal = sum(left == right for left, right in zip(one, other, strict=False))
    return equal / longest if (longest := max(len(one), len(other))) else 1.0


def surprisal(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of tokens ``[..., n]`` under logits ``[..., n, V]``, summed over ``n``, in nats."""
    return -logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the reference's distributions, ``[..., n, V]``, summed over ``n``, in nats.

    ``sum_v p(v) (log p(v) - log q(v))`` with ``p`` from the reference and ``q`` from the logits.
    """
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    # A token with probability 0 in the reference contributes nothing.
    terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - found))
    return terms.sum((-2, -1))


@dataclass(frozen=True)
class Metric:
    """How a metric over examples is computed from the results of each.

    Args:
        title: name in tables.
        figure: the value of each example that is summed.
        per: the value whose sum it is divided by; the number of examples if None.
        exponential: whether the metric is the exponential of that ratio.
        higher_is_better: whether higher values are better.
        percent: whether it is shown as a percentage.
    """

    title: str
    figure: str
    per: str | None = None
    exponential: bool = False
    higher_is_better: bool = True
    percent: bool = True


METRICS = {
    "exact": Metric("exact match", "exact"),
    "anls": Metric("ANLS", "anls"),
    "rouge_l": Metric("ROUGE-L", "rouge_l"),
    "perplexity": Metric("perplexity", "surprisal", "tokens", True, higher_is_better=False, percent=False),
    "same_answer": Metric("same answer as the full cache", "same_answer"),
    "same_tokens": Metric("same tokens as the full cache", "same_tokens"),
    "divergence": Metric(
        "KL divergence from the full cache, nats per token", "divergence", "tokens", False, False, False
    ),
    "held": Metric("KV bytes held after the prompt, of the full cache's", "held", higher_is_better=False),
}
"""The metrics by name. Perplexity and divergence are over all tokens of the right answers, end of sequence included;
the first one is predicted by the prefill, which no method changes."""


def metrics_of(task: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a task in results, by name."""
    return {name: Metric(**fields) for name, fields in task["metrics"].items()}


def check_installed(names: Collection[str]) -> None:
    """Raise ValueError if a library is missing that one of the metrics needs."""
    for name, library in {"anls": _anls_score, "rouge_l": _rouge_scorer}.items():
        if name in names:
            library()


@lru_cache(maxsize=1)
def _anls_score() -> Any:
    try:
        from anls_star import anls_score
    except ImportError as error:
        raise ValueError(f"ANLS needs the package anls-star, which is not installed: {INSTALL}.") from error
    return anls_score


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError(f"ROUGE needs the package rouge-score, which is not installed: {INSTALL}.") from error
    return RougeScorer(["rougeL"])
