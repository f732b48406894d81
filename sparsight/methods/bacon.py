"""BACON."""

from sparsight.compression import BACON, Evict, Grow, LastWindow, Uniform
from sparsight.compression.recipe import Recipe


def BACONCache(budget: float = 0.1, *, window: int = 32, pool: int = 5, pooling: str = "average") -> Recipe:
    """BACON: the window's attention is calibrated by what the last query attends to, its neighbours and earlier layers.

    Chen, Wu, Yao, Xu, Hu, Lee: Last But Not Least: Boundary Attention CalibratiON for Multimodal KV Cache Compression,
    EMNLP 2026, arXiv 2606.14782.

    Score: SnapKV's, calibrated for each KV head; ``VLCache().combined(score="bacon:post-vision")`` calibrates another
    one. Allocation: the same budget for each layer. Reduction: each KV head keeps the window and evicts its lowest
    scores. Decoding: new entries are appended.

    From the released code: window, pooling and the numbers of the evidence (4 layers, 5 neighbours, strength 0.5, twice
    the budget), the gate by the means, and that the window's own positions give no evidence. The budget is what a layer
    keeps beyond its window; where layers or heads keep different numbers, here their mean, as there for AdaKV.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        window: number of last queries whose attention is averaged and whose own entries are always kept.
        pool: width of the pooling along the sequence, an odd number.
        pooling: ``max`` or ``average``.
    """
    return Recipe(
        name="bacon",
        budget=budget,
        score=BACON(LastWindow(window=window, pool=pool, pooling=pooling)),
        allocate=Uniform(),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )
