"""The score of Expected Attention: future queries are modelled by those of the prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.compression.score import AttentionSums, BaseScore, Grids, NewQueries, PromptStates
from sparsight.models.prompt import Span
from sparsight.utils import checks


@dataclass(frozen=True)
class FutureQueries(BaseScore):
    """Expected attention of future queries, times the norm of the value (Expected Attention, arXiv 2510.00636).

    Queries before RoPE are taken to be Gaussian, with the mean and covariance of the prompt's. Rotated to the next
    ``future`` positions and averaged they have mean ``mu`` and covariance ``S``, and the expected attention to a key is
    ``softmax(k . mu / sqrt(d) + k' S k / (2 d))``. With multimodal RoPE the text to come has one position in all axes.

    Args:
        future: how many positions after the prompt.
        sinks: positions at the prompt's beginning that are left out of the statistics and of the softmax, and are as
            important as the most important other one.
    """

    kind: ClassVar[str] = "future-queries"
    needs_full_prompt: ClassVar[bool] = True
    before_rope: ClassVar[bool] = True
    future: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        checks.count("future", self.future, least=1)
        checks.count("sinks", self.sinks)

    def queries(self, span: Span) -> range:
        """Query positions whose mean and covariance count: all after the sinks, or the last."""
        return range(min(span.start + self.sinks, span.stop - 1), span.stop)

    def accumulator(self, heads: int, span: Span, device: torch.device) -> "QueryMoments":
        """Mean and covariance of the queries."""
        return QueryMoments(heads, span.length, device)

    def finish(self, attention: AttentionSums, states: PromptStates) -> Tensor:
        """Score ``[H_kv, T]`` of the complete prompt."""
        assert isinstance(attention, QueryMoments)
        length = states.key.shape[1]
        if length <= self.sinks:
            return torch.ones(len(states.key), length, device=states.key.device)
        moments = rotated_moments(attention.mean, attention.covariance, partial(self._ahead, states))
        key, value = states.key[:, self.sinks :], states.value[:, self.sinks :]
        score = expected_attention(*moments, key, value, attention.scaling)
        return torch.cat([score.amax(-1, keepdim=True).expand(-1, self.sinks), score], dim=1)

    def _ahead(self, states: PromptStates, vectors: Tensor) -> Tensor:
        """Vectors ``[H, n, D]`` rotated to the positions to come."""
        assert states.ahead is not None
        return states.ahead(vectors, self.future)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]``, as :meth:`finish` makes it."""
        return sums


class QueryMoments(AttentionSums):
    """Mean ``[H, D]`` and covariance ``[H, D, D]`` of queries before RoPE."""

    def __init__(self, heads: int, length: int, device: torch.device) -> None:
        super().__init__(heads, length, device)
        self.count, self.mean, self.covariance = 0, torch.empty(0), torch.empty(0)

    def add(self, new: NewQueries, threshold: float | None = None) -> Tensor | None:
        """Add queries before RoPE; no weights are computed, so none are counted."""
        count = new.query.shape[1]
        mean = new.query.mean(1)
        centred = new.query - mean[:, None]
        covariance = centred.mT @ centred / count
        if self.count:
            # The moments of two parts from those of each.
            share = count / (self.count + count)
            apart = mean - self.mean
            mean = self.mean + share * apart
            between = share * (1 - share) * apart[:, :, None] * apart[:, None]
            covariance = (1 - share) * self.covariance + share * covariance + between
        self.mean, self.covariance, self.scaling = mean, covariance, new.scaling
        self.count += count
        return None


def rotated_moments(mean: Tensor, covariance: Tensor, rotate: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean ``R mu`` ``[H, D]`` and covariance ``R S R'`` ``[H, D, D]`` of rotated queries.

    ``rotate`` multiplies vectors ``[H, n, D]`` by ``R``.
    """
    return rotate(mean[:, None])[:, 0], rotate(rotate(covariance).mT)


def expected_attention(mean: Tensor, covariance: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Expected attention to each key, averaged over the query heads of a KV head, times the norm of its value.

    Args:
        mean: float32 ``[H, D]``, of the queries after RoPE.
        covariance: float32 ``[H, D, D]``.
        key: ``[H_kv, n, D]``, after RoPE.
        value: ``[H_kv, n, D_v]``.
        scaling: factor of the logits, ``1 / sqrt(d)``.

    Returns:
        float32 ``[H_kv, n]``.
    """
    group = len(mean) // len(key)
    weights = []
    for head, (own_mean, own_covariance) in enumerate(zip(mean, covariance, strict=True)):
        states = key[head // group].float() * scaling
        # The mean of exp(q . k) over Gaussian queries is exp(mu . k + k' S k / 2).
        logits = states @ own_mean + ((states @ own_covariance) * states).sum(-1) / 2
        weights.append(functional.softmax(logits, dim=-1))
    return torch.stack(weights).unflatten(0, (len(key), group)).mean(1) * value.float().norm(dim=-1)
