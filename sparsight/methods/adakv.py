"""AdaKV."""

from sparsight.compression import AcrossHeads, Evict, Grow, LastWindow
from sparsight.compression.recipe import Recipe


def AdaKV(
    budget: float = 0.1,
    *,
    floor: float = 0.2,
    window: int = 32,
    pool: int = 7,
    pooling: str = "max",
    normalize: bool = False,
) -> Recipe:
    """AdaKV: the KV heads of a layer compete for its budget; a head keeps, and allocates memory for, only its share.

    Feng et al.: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, NeurIPS
    2025, arXiv 2407.11550.

    Score: SnapKV's, as in the paper's Ada-SnapKV; ``AdaKV().combined(score="post-vision")`` takes another one.
    Allocation: the same budget for each layer; within a layer one top-k over all heads decides how many entries each
    head keeps, above a floor. Reduction: each head evicts by its own scores. Decoding: new entries are appended.

    From the paper: one top-k over the heads, mixed with the equal share (algorithms 1 and 2). From the authors' code
    (``snapkv_utils.py``): the floor of 0.2, attention averaged over the window and over the query heads that share a KV
    head before it is pooled, ``normalize``. Not from the code: it rounds each head's number by itself; here a layer's
    heads keep its budget exactly.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        floor: fraction of the uniform share that every head is given.
        window: number of last queries whose attention is summed and whose own entries are always kept; at most two
            thirds of the entries that the budget allows.
        pool: width of the pooling along the sequence, an odd number.
        pooling: ``max`` or ``average``.
        normalize: weight each head by how concentrated its scores are, an option of the authors' code.
    """
    return Recipe(
        name="adakv",
        budget=budget,
        score=LastWindow(window=window, pool=pool, pooling=pooling),
        allocate=AcrossHeads(floor=floor, normalize=normalize),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
