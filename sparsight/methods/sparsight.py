"""Sparsight, the project's own method."""

from sparsight.compression import AcrossLayers, DistinctValues, Evict, Grow
from sparsight.compression.recipe import Recipe


def Sparsight(
    budget: float = 0.1, *, height: int = 1, width: int = 5, weight: float = 0.15, floor: float = 0.1
) -> Recipe:
    """Sparsight: what the question attends to, and distinct image values in the heads that read the image.

    The project's own method. It needs no calibration and no second pass over the prompt.

    Score: attention of the text after the image, the last query counting for one half, max-pooled on the image's patch
    grid, since the prompt's queries attend to where an answer begins and only decoding to its continuation in the
    neighbouring patches; plus, for later questions, how far a vision token's value is from the image's mean, times the
    largest weight that the text gives a vision token in that KV head. Allocation: a tenth of the budget is shared
    equally, for the rest the KV heads of all layers compete. Reduction: each head evicts its lowest scores. Decoding:
    new entries are appended. The choices were measured on the shipped model (docs/recipe-search.md).

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over all KV heads, in (0, 1].
        height: height of the pooling window on the patch grid, an odd number.
        width: width of the pooling window, an odd number. Without a patch grid it lies along the sequence.
        weight: of the values, in [0, 1].
        floor: fraction of the budget that all heads share equally, in [0, 1].
    """
    return Recipe(
        name="sparsight",
        budget=budget,
        score=DistinctValues(pool=(height, width), weight=weight),
        allocate=AcrossLayers(floor=floor),
        reduce=Evict(recent=0),
        decode=Grow(),
    )
