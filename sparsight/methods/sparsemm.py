"""SparseMM."""

from collections.abc import Sequence

from sparsight.compression import Evict, Grow, LastWindow, VisualHeads
from sparsight.compression.recipe import Recipe


def SparseMM(
    budget: float = 0.1,
    *,
    heads: Sequence[Sequence[float]] = (),
    window: int = 32,
    pool: int = 5,
    equal: float = 0.1,
) -> Recipe:
    """SparseMM: visual heads, those that read text in images, keep more entries; they are found once per model.

    Wang et al.: SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs, ICCV 2025, arXiv 2506.05344.

    Score: max-pooled attention of the last queries, as in SnapKV. Allocation: every KV head is given the window and an
    equal part of the remaining budget; the rest is shared in proportion to the head scores. Reduction: each head keeps
    the window and evicts its lowest scores. Decoding: new entries are appended.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over all KV heads, in (0, 1].
        heads: score of each layer's KV heads, as ``sparsight calibrate`` measures them
            (:func:`sparsight.eval.calibration.head_scores`).
        window: number of last queries whose attention is summed and whose own entries are always kept.
        pool: width of the max pooling along the sequence, an odd number.
        equal: fraction of the budget beyond the window that is shared equally (the paper's ``rho``).
    """
    return Recipe(
        name="sparsemm",
        budget=budget,
        score=LastWindow(window=window, pool=pool),
        allocate=VisualHeads(scores=tuple(map(tuple, heads)), window=window, equal=equal),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
