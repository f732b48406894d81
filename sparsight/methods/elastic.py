"""Elastic Cache."""

from sparsight.compression import Accumulated, FixedPoint, MergeNearest, Uniform
from sparsight.compression.recipe import Recipe


def ElasticCache(budget: float = 0.1, *, distance: int = 25, protect_first: int = 1) -> Recipe:
    """Elastic Cache: less important entries merge into the nearest important one; decoding drops at a fixed point.

    Liu et al.: Efficient Inference of Vision Instruction-Following Models with Elastic Cache, ECCV 2024, arXiv
    2407.18121.

    Score: accumulated attention over all queries. Allocation: the same budget for each layer. Reduction: the highest
    scores become anchors, and every other entry is averaged into the nearest anchor by position; the heads of a layer
    share their anchors. Decoding: where a new entry exceeds the budget of the tokens seen, the entry at a fixed
    position is dropped.

    From the paper: importance, anchors, means over buckets (section 3.3), the protected first and last entry (section
    4.1) and the distance of 25. From the authors' code (``kv_cache.py``): protected entries stay unchanged and nothing
    merges into them, and the number of entries allowed is rounded up. Not from the code: it takes ``argsort(score)``
    for a rank, keeps one entry less than the budget, shifts the dropped entries by ``start_size`` and lets a new token
    attend before an entry leaves; here the entry leaves first, and never a protected first one.

    Args:
        budget: fraction of the tokens seen whose KV entries a layer may hold, after prefill and during decoding.
        distance: number of entries between the fixed position and the end of the entries kept after prefill.
        protect_first: number of entries at the start of the prompt that are always kept, unchanged.
    """
    return Recipe(
        name="elastic",
        budget=budget,
        score=Accumulated(),
        allocate=Uniform(),
        reduce=MergeNearest(protect_first=protect_first),
        decode=FixedPoint(distance=distance, protect_first=protect_first),
    )
