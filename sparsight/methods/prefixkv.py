"""PrefixKV."""

from sparsight.compression import Accumulated, Evict, Grow, SharedMass
from sparsight.compression.recipe import Recipe


def PrefixKV(budget: float = 0.1, *, recent: float = 0.1) -> Recipe:
    """PrefixKV: every layer keeps the most important entries up to the same share of its attention.

    Wang et al.: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
    Generation, arXiv 2412.03409. The threshold is found for each prompt; the paper finds it once, on ten prompts. The
    heads of a layer share one choice.

    Args:
        budget: fraction of the prompt's KV entries that may be kept, averaged over the layers.
        recent: fraction of a layer's entries that are the most recent ones.
    """
    return Recipe(
        name="prefixkv",
        budget=budget,
        score=Accumulated(),
        allocate=SharedMass(),
        reduce=Evict(recent=recent, per_head=False),
        decode=Grow(),
    )
