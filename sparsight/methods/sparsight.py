"""Our own method."""

from sparsight.compression import Evict, Grow, PostVision, Uniform
from sparsight.compression.recipe import Recipe


def Sparsight(budget: float = 0.1, *, height: int = 1, width: int = 5, recent: float = 0.1) -> Recipe:
    """Sparsight: what the text after the image attends to, with its neighbours in the image, chosen by every KV head.

    VL-Cache's scores, pooled on the image's patch grid: the prompt's queries attend to where an answer begins, and only
    decoding asks for how it goes on, which lies beside it. Every layer keeps the same share. What else could be part of
    it was measured on the model that ships (benchmarks/recipe_candidates.py).

    Args:
        budget: fraction of the prompt's KV entries that may be kept.
        height: of the max pooling's window on the patch grid, an odd number.
        width: of that window; where a family has no grid, it lies along the sequence.
        recent: fraction of the kept entries that are the most recent ones.
    """
    return Recipe(
        name="sparsight",
        budget=budget,
        score=PostVision(pool=(height, width)),
        allocate=Uniform(),
        reduce=Evict(recent=recent),
        decode=Grow(),
    )
