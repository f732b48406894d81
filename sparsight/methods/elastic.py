"""Elastic Cache."""

from sparsight.compression import Accumulated, FixedPoint, MergeNearest, Uniform
from sparsight.compression.recipe import Recipe


def ElasticCache(budget: float = 0.1, *, distance: int = 25, protect_first: int = 1) -> Recipe:
    """Elastic Cache: less important entries merge into the nearest important one; decoding drops at a fixed point.

    Liu et al.: Efficient Inference of Vision Instruction-Following Models with Elastic Cache, ECCV 2024, arXiv
    2407.18121. Importance is the accumulated attention over all queries, as the paper writes; the authors' released
    code compares its argsort with a threshold instead of the rank, which is not followed.

    Args:
        budget: fraction of the tokens seen whose KV entries may be held, during prefill and decoding.
        distance: entries between the fixed point and the end of the entries kept after prefill.
        protect_first: entries at the prompt's beginning that always stay.
    """
    return Recipe(
        name="elastic",
        budget=budget,
        score=Accumulated(),
        allocate=Uniform(),
        reduce=MergeNearest(protect_first=protect_first),
        decode=FixedPoint(distance=distance, protect_first=protect_first),
    )
