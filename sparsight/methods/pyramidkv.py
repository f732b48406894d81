"""PyramidKV."""

from sparsight.compression import Evict, Grow, LastWindow, Pyramid
from sparsight.compression.recipe import Recipe


def PyramidKV(budget: float = 0.1, *, window: int = 32, pool: int = 7, steepness: float = 20.0) -> Recipe:
    """PyramidKV: SnapKV's selection with budgets that fall linearly from the first layer to the last.

    Cai et al.: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069.

    Score: max-pooled attention of the last queries. Allocation: a pyramid over the layers. Reduction: each KV head
    keeps the window and evicts its lowest scores. Decoding: new entries are appended.

    The budget includes the window, so that the mean over the layers is the budget exactly.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over the layers, in (0, 1].
        window: number of last queries whose attention is summed and whose own entries are always kept.
        pool: width of the max pooling along the sequence, an odd number.
        steepness: the paper's ``beta``: the last layer keeps ``1 / steepness`` of the mean budget.
    """
    return Recipe(
        name="pyramidkv",
        budget=budget,
        score=LastWindow(window=window, pool=pool),
        allocate=Pyramid(steepness=steepness),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
