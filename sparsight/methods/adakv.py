"""AdaKV."""

from sparsight.compression import AcrossHeads, Evict, Grow, LastWindow
from sparsight.compression.recipe import Recipe


def AdaKV(budget: float = 0.1, *, floor: float = 0.2, window: int = 32, pool: int = 7) -> Recipe:
    """AdaKV: the heads of a layer compete for its entries; each holds, and takes memory for, only what it won.

    Feng et al.: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, NeurIPS
    2025, arXiv 2407.11550. With SnapKV's scores, as the paper's Ada-SnapKV; over any other by
    ``AdaKV().combined(score="post-vision")``.

    Args:
        budget: fraction of the prompt's KV entries that may be kept, averaged over the heads of each layer.
        floor: fraction of the equal share that every head has.
        window: last queries that are looked at, whose entries always stay.
        pool: width of the pooling.
    """
    return Recipe(
        name="adakv",
        budget=budget,
        score=LastWindow(window=window, pool=pool),
        allocate=AcrossHeads(floor=floor),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
