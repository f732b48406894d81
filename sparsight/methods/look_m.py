"""LOOK-M."""

from sparsight.compression import Accumulated, Grow, MergeSimilar, Uniform
from sparsight.compression.recipe import Recipe


def LookM(budget: float = 0.1, *, recent: float = 0.5) -> Recipe:
    """LOOK-M: text before vision; what is dropped is averaged into the entry with the most similar key.

    Wan et al.: LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference, arXiv
    2406.18139. Of the paper's three mergings it is the averaged one; half the budget is recent, as in H2O, which it
    builds on.

    Args:
        budget: fraction of the prompt's KV entries that may be kept.
        recent: fraction of a layer's entries that are the most recent ones.
    """
    return Recipe(
        name="look-m",
        budget=budget,
        score=Accumulated(text_first=True),
        allocate=Uniform(),
        reduce=MergeSimilar(recent=recent),
        decode=Grow(),
    )
