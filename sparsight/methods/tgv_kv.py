"""TGV-KV."""

from sparsight.compression import Evict, Grow, TextGrounded, TextVision
from sparsight.compression.recipe import Recipe


def TGVKV(budget: float = 0.1, *, sinks: int = 4) -> Recipe:
    """TGV-KV: the text after the image ranks the image's entries and sets layer budgets; text is kept before vision.

    Liu, Han, Zhang, Shao, Liu, Guan, Wang: TGV-KV: Text-Grounded KV Eviction for Vision-Language Models, ICML 2026,
    arXiv 2606.03075.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over the layers, in (0, 1].
        sinks: number of entries at the start of the prompt that are always kept.
    """
    return Recipe(
        name="tgv-kv",
        budget=budget,
        score=TextGrounded(),
        allocate=TextVision(),
        reduce=Evict(recent=0, first=sinks, per_head=False),
        decode=Grow(),
    )
