"""Sparsight, the project's own method."""

from sparsight.compression import Evict, Grow, PostVision, Uniform
from sparsight.compression.recipe import Recipe


def Sparsight(budget: float = 0.1, *, height: int = 1, width: int = 5, recent: float = 0.1) -> Recipe:
    """Sparsight: what the text after the image attends to, with its neighbours in the image, selected per KV head.

    The project's own method.

    Score: attention summed over the post-vision queries, as in VL-Cache, then max-pooled on the image's patch grid. The
    prompt's queries attend to where an answer begins; only decoding attends to its continuation, in the neighbouring
    patches. Allocation: the same budget for each layer. Reduction: each KV head keeps its recent entries and evicts the
    lowest scores. Decoding: new entries are appended. The choices were measured on the shipped model
    (benchmarks/recipe_candidates.py).

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        height: height of the pooling window on the patch grid, an odd number.
        width: width of the pooling window, an odd number. Without a patch grid it lies along the sequence.
        recent: fraction of a layer's entries that are reserved for the most recent ones.
    """
    return Recipe(
        name="sparsight",
        budget=budget,
        score=PostVision(pool=(height, width)),
        allocate=Uniform(),
        reduce=Evict(recent=recent),
        decode=Grow(),
    )
