"""VL-Cache."""

from sparsight.compression import Evict, Grow, PostVision, SparsityAware
from sparsight.compression.recipe import Recipe


def VLCache(
    budget: float = 0.1,
    *,
    threshold: float = 0.01,
    recent: float = 0.1,
    per_head: bool = True,
    water_fill: bool = True,
) -> Recipe:
    """VL-Cache: layers get entries by their measured sparsity, and keep those that the text after the image attends to.

    Tu, Vashchilenko, Lu, Xu: VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Model
    Inference Acceleration, arXiv 2410.23317.

    Args:
        budget: fraction of the prompt's KV entries that may be kept, averaged over the layers.
        threshold: ``p`` of the filter that sparsity is measured with (equation 1).
        recent: fraction of a layer's entries that are the most recent ones.
        per_head: every KV head chooses its own entries; otherwise the heads of a layer share one choice.
        water_fill: hand what clipping adds or removes back to the other layers, so that the total is the budget; the
            paper's plain clip otherwise.
    """
    return Recipe(
        name="vl-cache",
        budget=budget,
        score=PostVision(),
        allocate=SparsityAware(threshold=threshold, water_fill=water_fill),
        reduce=Evict(recent=recent, per_head=per_head),
        decode=Grow(),
    )
