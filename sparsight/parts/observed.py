"""What allocations go by, and what they give."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observed:
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


Share = float | list[float]
"""Share of the prompt's entries that a layer keeps, or of each of its KV heads."""
