"""SnapKV."""

from sparsight.compression import Evict, Grow, LastWindow, Uniform
from sparsight.compression.recipe import Recipe


def SnapKV(budget: float = 0.1, *, window: int = 32, pool: int = 7, pooling: str = "max") -> Recipe:
    """SnapKV: every KV head keeps the neighbourhoods that the last queries attend to, and those queries' own entries.

    Li et al.: SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024, arXiv 2404.14469.

    Score: attention of the last queries, pooled along the sequence. Allocation: the same budget for each layer.
    Reduction: each KV head keeps the window and evicts its lowest scores. Decoding: new entries are appended.

    From the paper and the authors' code (``snapkv_utils.py``): the attention of the window's queries, pooled over what
    comes before the window, and the window itself. Window 32, width 7 and ``max`` are those of their experiments. Not
    from either: the window shrinks at small budgets, and where query heads share a KV head their attention is averaged,
    as in the code of PyramidKV and AdaKV; SnapKV's repeats the keys and selects for each query head.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        window: number of last queries whose attention is summed and whose own entries are always kept; at most two
            thirds of the entries that the budget allows.
        pool: width of the pooling along the sequence, an odd number.
        pooling: ``max``, as in the authors' experiments with width 7, or ``average``, their library's default with 5.
    """
    return Recipe(
        name="snapkv",
        budget=budget,
        score=LastWindow(window=window, pool=pool, pooling=pooling),
        allocate=Uniform(),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
