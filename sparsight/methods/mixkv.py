"""MixKV."""

from sparsight.compression import Evict, Grow, LastWindow, MixKV, Uniform
from sparsight.compression.recipe import Recipe


def MixKVCache(budget: float = 0.1, *, window: int = 32, pool: int = 5, pooling: str = "average") -> Recipe:
    """MixKV: attention is mixed with value norms and key diversity; heads with similar keys weight diversity more.

    Liu, Gui, Zhang, Zhang: Mixing Importance with Diversity: Joint Optimization for KV Cache Compression in Large
    Vision-Language Models, ICLR 2026, arXiv 2510.20707.

    Score: SnapKV's, mixed for each KV head; ``VLCache().combined(score="mixkv:post-vision")`` mixes another one.
    Allocation: the same budget for each layer. Reduction: each KV head keeps the window and evicts its lowest scores.
    Decoding: new entries are appended.

    From the paper: the formula, with the mean cosine of a head's keys as the weight of diversity. From the released
    code: window and pooling; norms and diversity are scaled over the positions before the window, while the mean key is
    that of all positions. Not from it: there, except for GUI models, that weight is read from a file measured on one
    Qwen model, and AdaKV and SparseMM share a layer's budget by the attention, here by the mixed score.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        window: number of last queries whose attention is summed and whose own entries are always kept.
        pool: width of the pooling along the sequence, an odd number.
        pooling: ``max`` or ``average``.
    """
    return Recipe(
        name="mixkv",
        budget=budget,
        score=MixKV(LastWindow(window=window, pool=pool, pooling=pooling)),
        allocate=Uniform(),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
