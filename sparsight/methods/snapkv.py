"""SnapKV."""

from sparsight.compression import Evict, Grow, LastWindow, Uniform
from sparsight.compression.recipe import Recipe


def SnapKV(budget: float = 0.1, *, window: int = 32, pool: int = 7) -> Recipe:
    """SnapKV: every head keeps the neighbourhoods that the last queries attend to, and the window of those queries.

    Li et al.: SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024, arXiv 2404.14469. Pooling is
    by the maximum.

    Args:
        budget: fraction of the prompt's KV entries that may be kept.
        window: last queries that are looked at, whose entries always stay.
        pool: width of the pooling.
    """
    return Recipe(
        name="snapkv",
        budget=budget,
        score=LastWindow(window=window, pool=pool),
        allocate=Uniform(),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
