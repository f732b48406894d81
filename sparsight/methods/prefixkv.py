"""PrefixKV."""

from sparsight.compression import Accumulated, Evict, FixedPoint, SharedMass
from sparsight.compression.recipe import Recipe


def PrefixKV(budget: float = 0.1, *, distance: int = 25) -> Recipe:
    """PrefixKV: every layer keeps the smallest set of entries that reaches the same share of its attention mass.

    Wang et al.: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
    Generation, arXiv 2412.03409.

    Score: accumulated attention over all queries. Allocation: one threshold of cumulative attention mass for all
    layers, found by bisection so that the mean budget is met. Reduction: the KV heads of a layer share one eviction,
    which spares the first and the last entry. Decoding: where a new entry exceeds the layer's share of the tokens seen,
    the entry at a fixed position is dropped.

    From the paper: the threshold and its bisection. From the authors' code (``prefixkv.py``): importance averaged over
    heads; the first and the last entry, which only this selection protects; the fixed position, 25 before the end of
    what was kept, or in its middle; the number of entries allowed, rounded up. Not from the code: it takes each layer's
    share from a profile of earlier prompts, scaled to the budget, with the two protected entries on top, and lets a new
    token attend before an entry leaves. Here every prompt finds its own threshold, the protected entries are part of
    the budget, and the entry leaves first.

    Args:
        budget: fraction of the tokens seen whose KV entries may be held, averaged over the layers, in (0, 1].
        distance: number of entries between the fixed position and the end of the entries kept after prefill.
    """
    return Recipe(
        name="prefixkv",
        budget=budget,
        score=Accumulated(),
        allocate=SharedMass(),
        reduce=Evict(recent=0, first=1, per_head=False),
        decode=FixedPoint(distance=distance, middle=True),
    )
