"""AirCache."""

from sparsight.compression import EliteWindow, Evict, Grow, StrengthSkewness
from sparsight.compression.recipe import Recipe


def AirCache(budget: float = 0.1, *, threshold: float = 0.9) -> Recipe:
    """AirCache: the text tokens that matter most to the question select the vision tokens and set each layer's budget.

    Huang et al.: AirCache: Activating Inter-modal Relevancy KV Cache Compression for Efficient Large Vision-Language
    Model Inference, ICCV 2025, arXiv 2503.23956.

    Score: mean attention of the elite window, the queries after the last image that the last token attends to most;
    text tokens rank before vision tokens. Allocation: layers whose attention to vision is strong or skewed keep more.
    Reduction: each KV head evicts its lowest scores. Decoding: new entries are appended.

    The paper's budget counts vision tokens only; here it counts all entries, as for every other method, unless the
    recipe's ``vision_budget`` is set. The paper does not say which text forms the observation window, nor whether heads
    share it: here it is the text after the last image, and the heads of a layer share one elite window.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over the layers, in (0, 1].
        threshold: a query is in the elite window if the last token attends to it at least this fraction as much as to
            the query that it attends to most (the paper's ``alpha``).
    """
    return Recipe(
        name="aircache",
        budget=budget,
        score=EliteWindow(threshold=threshold),
        allocate=StrengthSkewness(),
        reduce=Evict(recent=0),
        decode=Grow(),
    )
