"""PrefixKV."""

from sparsight.compression import Accumulated, Evict, Grow, SharedMass
from sparsight.compression.recipe import Recipe


def PrefixKV(budget: float = 0.1, *, recent: float = 0.1) -> Recipe:
    """PrefixKV: every layer keeps the smallest set of entries that reaches the same share of its attention mass.

    Wang et al.: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
    Generation, arXiv 2412.03409.

    Score: accumulated attention over all queries. Allocation: one threshold of cumulative attention mass for all
    layers, found by bisection so that the mean budget is met. Reduction: the KV heads of a layer share one eviction.
    Decoding: new entries are appended.

    The threshold is found for each prompt; the paper finds it once, on ten prompts.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over the layers, in (0, 1].
        recent: fraction of a layer's entries that are reserved for the most recent ones.
    """
    return Recipe(
        name="prefixkv",
        budget=budget,
        score=Accumulated(),
        allocate=SharedMass(),
        reduce=Evict(recent=recent, per_head=False),
        decode=Grow(),
    )
