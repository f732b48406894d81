"""The score of MixKV: another score, mixed with how large the values and how different the keys are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.compression.score import AttentionSums, BaseScore, PromptStates
from sparsight.compression.wrapped_score import WrappedScore


@dataclass(frozen=True)
class MixKV(WrappedScore):
    """Any score, mixed with value norms and key diversity (MixKV, arXiv 2510.20707): ``MixKV(PostVision())``.

    The more alike the keys of a KV head are, the more the diversity counts, see :func:`mixed`.

    Args:
        score: the importance that is mixed.

    Raises:
        ValueError: it is not a score, or one that repeats the prompt.
    """

    kind: ClassVar[str] = "mixkv"

    def __post_init__(self) -> None:
        if not isinstance(self.score, BaseScore):
            raise ValueError(f"Score {self.kind!r} wraps another score such as PostVision(), got {self.score!r}.")
        if self.score.needs_replay:
            raise ValueError(f"Score {self.kind!r} cannot wrap {self.score.kind!r}, which repeats the prompt.")

    def finish(self, attention: AttentionSums, states: PromptStates) -> Tensor:
        """Score ``[H_kv, T]`` of the complete prompt."""
        return mixed(self.score.finish(attention, states), states.key, states.value, states.always)


def mixed(score: Tensor, key: Tensor, value: Tensor, always: Tensor) -> Tensor:
    """``(1 - r) (score + norm) + r diversity`` for each KV head (MixKV), ``[H_kv, T]``.

    With ``m`` the mean of the unit keys, ``r = (T |m|^2 - 1) / (T - 1)`` is the mean cosine of two different keys, and
    the diversity of a key is its negative inner product with ``m``. Norms of values and diversities are scaled to
    [0, 1] and then to the mean of the score, over the positions that compete, as in the released code; those that
    stay anyway keep their score.

    Args:
        score: ``[H_kv, T]``.
        key: ``[H_kv, T, D]``.
        value: ``[H_kv, T, D]``.
        always: bool ``[T]`` on the CPU, the positions that stay whatever their score.
    """
    competing = (~always).nonzero()[:, 0].to(score.device, non_blocking=True)
    if not len(competing):
        return score
    unit = functional.normalize(key.float(), dim=-1)
    length, center = key.shape[1], unit.mean(1)
    redundancy = (length * center.square().sum(-1, keepdim=True) - 1) / max(length - 1, 1)
    diversity = -(unit @ center[..., None])[..., 0]
    own = score[:, competing]
    level = own.mean(-1, keepdim=True)
    norm, diversity = (scaled(each[:, competing], level) for each in (value.float().norm(dim=-1), diversity))
    return score.index_copy(1, competing, (1 - redundancy) * (own + norm) + redundancy * diversity)


def scaled(numbers: Tensor, level: Tensor) -> Tensor:
    """Numbers ``[H, n]`` brought to [0, 1] and then to the mean ``level`` ``[H, 1]``; 0 where all are equal."""
    least = torch.finfo(numbers.dtype).tiny
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    numbers = (numbers - low) / (high - low).clamp(min=least)
    return numbers * (level / numbers.mean(-1, keepdim=True).clamp(min=least))
