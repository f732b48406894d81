"""What allocations go by, and what they give."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """What the prefill of one sequence showed in one layer.

    Args:
        score: importance of each position, float32 ``[H_kv, T]``.
        sparsity: of the post-vision rows; 0 where the allocation has no threshold to measure it with.
        vision: bool ``[T]``, the position is a vision token's.
        always: bool ``[T]``, the position stays whatever its score, when the budget is shared equally.
    """

    score: Tensor
    sparsity: float
    vision: Tensor
    always: Tensor


KeepRatio = float | list[float]
"""Share of the prompt's entries that a layer keeps, or of each of its KV heads."""


def gather_to_cpu(layers: Iterable[Tensor]) -> Tensor:
    """What several layers, maybe on several devices, have of the same shape, stacked on the CPU by one copy."""
    first, *others = layers
    return torch.stack([first, *(other.to(first.device, non_blocking=True) for other in others)]).cpu()
