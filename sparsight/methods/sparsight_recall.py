"""Sparsight with recall."""

from sparsight.compression import Evict, Exact, KeyIndex, PostVision, Recall, Uniform
from sparsight.compression.recipe import Recipe
from sparsight.compression.score import Window


def SparsightRecall(
    budget: float = 0.1,
    *,
    every: int = 4,
    index: KeyIndex = Exact(),  # noqa: B008  # frozen
    pool: Window = (1, 7),
    height: int = 1,
    width: int = 5,
    recent: float = 0.1,
) -> Recipe:
    """Sparsight with recall: what decoding attends to is fetched from the full cache, which lies in host memory.

    The project's own method.

    Score: attention of the text after the image, max-pooled on the image's patch grid. Allocation: every KV head keeps
    as much. Reduction: each head evicts its lowest scores. Decoding: new entries are appended, and every few tokens the
    newest query ranks all positions of the prompt; entries that rank highest replace those that rank lowest. The
    numbers were measured on the shipped model (benchmarks/recall.py).

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        every: tokens from one ranking to the next.
        index: what the ranking knows of the keys.
        pool: height and width of the ranking's pooling window, odd numbers; a width along the sequence if it is one.
        height: height of the score's pooling window on the patch grid, an odd number.
        width: width of the score's pooling window, an odd number. Without a patch grid it lies along the sequence.
        recent: fraction of a layer's entries that are reserved for the most recent ones of the prompt.
    """
    return Recipe(
        name="sparsight-recall",
        budget=budget,
        score=PostVision(pool=(height, width)),
        allocate=Uniform(),
        reduce=Evict(recent=recent),
        decode=Recall(every, index, pool),
    )
