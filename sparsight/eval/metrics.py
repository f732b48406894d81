"""Metrics of one answer, and what a table says about many: pure functions and the table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

INSTALL = "pip install 'sparsight[eval]'"


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer is the reference, letter for letter, but for blanks around it; else 0."""
    return float(answer.strip() == reference.strip())


def anls(answer: str, reference: str) -> float:
    """Average normalised Levenshtein similarity with threshold 0.5, in ``[0, 1]``, as DocVQA is judged.

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
    """Share of equal tokens, place by place, over the longer answer; 1 for two empty ones."""
    equal = sum(left == right for left, right in zip(one, other, strict=False))
    return equal / longest if (longest := max(len(one), len(other))) else 1.0


def surprisal(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of tokens ``[..., n]`` under logits ``[..., n, V]``, summed over ``n``, in nats."""
    return -logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the reference's distributions, ``[..., n, V]``, summed over ``n``, in nats.

    ``sum_v p(v) (log p(v) - log q(v))`` with ``p`` of the reference and ``q`` of the logits.
    """
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    # A token that the reference excludes adds nothing, whatever the other says.
    terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - found))
    return terms.sum((-2, -1))


@dataclass(frozen=True)
class Metric:
    """How a metric of many examples comes from figures of each.

    Args:
        title: what tables call it.
        figure: the figure of each example that is summed.
        per: the figure that the sum is divided by; the number of examples if None.
        exponential: the exponential of that.
        higher_is_better: which way is up.
        percent: shown as a percentage.
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
    "divergence": Metric("KL from the full cache, nats a token", "divergence", "tokens", False, False, False),
}
"""The metrics by name. Perplexity and divergence are about all tokens of the right answers, end of sequence included;
the first of them comes from the prefill itself, which no method changes."""


def metrics_of(task: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a task in results, by name."""
    return {name: Metric(**fields) for name, fields in task["metrics"].items()}


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
