"""AirCache."""

from sparsight.compression import EliteWindow, Evict, Grow, StrengthSkewness
from sparsight.compression.recipe import Recipe


def AirCache(budget: float = 0.1, *, threshold: float = 0.9) -> Recipe:
    """AirCache: the text that the question hangs on says which vision tokens matter, and how much vision a layer needs.

    Huang et al.: AirCache: Activating Inter-modal Relevancy KV Cache Compression for Efficient Large Vision-Language
    Model Inference, ICCV 2025, arXiv 2503.23956. The paper's budget counts vision tokens, and text always stays; here
    it counts all, so that it means the same for every method, and text comes first. Left open by the paper, and chosen:
    the observation window is made of the text after the last image, the elite are common to a layer's heads, and each
    KV head selects by itself.

    Args:
        budget: fraction of the prompt's KV entries that may be kept, averaged over the layers.
        threshold: the elite are minded at least this times as much as the most minded (the paper's ``alpha``).
    """
    return Recipe(
        name="aircache",
        budget=budget,
        score=EliteWindow(threshold=threshold),
        allocate=StrengthSkewness(),
        reduce=Evict(recent=0),
        decode=Grow(),
    )
