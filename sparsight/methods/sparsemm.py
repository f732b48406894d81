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
    """SparseMM: heads that read images keep more; which ones they are is measured once a model.

    Wang et al.: SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs, ICCV 2025, arXiv 2506.05344.
    Within a head selection is SnapKV's; pooling is by the maximum, as everywhere here.

    Args:
        budget: fraction of the prompt's KV entries that may be kept, averaged over all heads.
        heads: score of each layer's KV heads, as ``sparsight calibrate`` measures them
            (:func:`sparsight.eval.calibration.head_scores`).
        window: last queries that are looked at, whose entries always stay.
        pool: width of the pooling.
        equal: fraction of the budget beyond the window that all heads share equally (the paper's ``rho``).
    """
    return Recipe(
        name="sparsemm",
        budget=budget,
        score=LastWindow(window=window, pool=pool),
        allocate=VisualHeads(scores=tuple(map(tuple, heads)), window=window, equal=equal),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
