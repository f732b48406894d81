"""PyramidKV."""

from sparsight.compression import Evict, Grow, LastWindow, Pyramid
from sparsight.compression.recipe import Recipe


def PyramidKV(budget: float = 0.1, *, window: int = 32, pool: int = 7, steepness: float = 20.0) -> Recipe:
    """PyramidKV: SnapKV's choice within layers whose budgets fall linearly from the first to the last.

    Cai et al.: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069. The
    budget includes the window, so that the mean share is the budget exactly.

    Args:
        budget: fraction of the prompt's KV entries that may be kept, averaged over the layers.
        window: last queries that are looked at, whose entries always stay.
        pool: width of the pooling.
        steepness: the paper's ``beta``: the last layer keeps ``1 / steepness`` of the mean.
    """
    return Recipe(
        name="pyramidkv",
        budget=budget,
        score=LastWindow(window=window, pool=pool),
        allocate=Pyramid(steepness=steepness),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
