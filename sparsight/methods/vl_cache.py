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
    """VL-Cache: budgets follow each layer's measured sparsity; entries are ranked by post-vision attention.

    Tu, Vashchilenko, Lu, Xu: VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Model
    Inference Acceleration, arXiv 2410.23317.

    Score: attention summed over the post-vision queries, those after the last vision token. Allocation: layers with
    denser post-vision attention keep more. Reduction: recent entries and the highest scores are kept, the others are
    evicted. Decoding: new entries are appended.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over the layers, in (0, 1].
        threshold: ``p`` of the filter that sparsity is measured with (equation 1).
        recent: fraction of a layer's entries that are reserved for the most recent ones.
        per_head: select entries per KV head; if false, the heads of a layer share one selection.
        water_fill: redistribute what clipping adds or removes among the other layers, so that the mean is the budget;
            if false, the paper's plain clip.
    """
    return Recipe(
        name="vl-cache",
        budget=budget,
        score=PostVision(),
        allocate=SparsityAware(threshold=threshold, water_fill=water_fill),
        reduce=Evict(recent=recent, per_head=per_head),
        decode=Grow(),
    )
