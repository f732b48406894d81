"""PyramidKV."""

from sparsight.compression import Evict, Grow, LastWindow, Pyramid
from sparsight.compression.recipe import Recipe


def PyramidKV(
    budget: float = 0.1, *, window: int = 8, pool: int = 7, pooling: str = "max", steepness: float = 20.0
) -> Recipe:
    """PyramidKV: SnapKV's selection with budgets that fall linearly from the first layer to the last.

    Cai et al.: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069.

    Score: pooled attention of the last queries. Allocation: every layer has the window, and the rest of the budget
    falls linearly over the layers. Reduction: each KV head keeps the window and evicts its lowest scores. Decoding: new
    entries are appended.

    From the paper: the line of budgets (section 4.2), the window of 8 and ``beta`` 20 (section 5.1). From the authors'
    code (KVCache-Factory, ``pyramidkv_utils.py``): pooling, the first layer's limit, equal budgets where they exceed
    half of the prompt. Not from the code: it rounds the step between layers down, which keeps more than the budget.
    Here the mean over the layers, the window included, is the budget.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over the layers, in (0, 1].
        window: number of last queries whose attention is summed and whose own entries are always kept; at most two
            thirds of the entries that the budget allows.
        pool: width of the pooling along the sequence, an odd number.
        pooling: ``max`` or ``average``.
        steepness: the paper's ``beta``: the last layer keeps the window and ``1 / steepness`` of the mean of the rest.
    """
    return Recipe(
        name="pyramidkv",
        budget=budget,
        score=LastWindow(window=window, pool=pool, pooling=pooling),
        allocate=Pyramid(steepness=steepness),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
