"""LOOK-M."""

from sparsight.compression import Accumulated, Grow, MergeSimilar, Uniform
from sparsight.compression.recipe import Recipe


def LookM(budget: float = 0.1, *, recent: float = 0.5) -> Recipe:
    """LOOK-M: text before vision; each dropped entry is averaged into the kept entry with the most similar key.

    Wan et al.: LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference, arXiv
    2406.18139.

    Score: accumulated attention, with every text token above every vision token. Allocation: the same budget for each
    layer. Reduction: recent entries and the highest scores are kept, the others merge into them. Decoding: new entries
    are appended.

    Of the paper's three merging strategies this is averaged merging. The share of recent entries follows H2O, which
    LOOK-M builds on.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        recent: fraction of a layer's entries that are reserved for the most recent ones.
    """
    return Recipe(
        name="look-m",
        budget=budget,
        score=Accumulated(text_first=True),
        allocate=Uniform(),
        reduce=MergeSimilar(recent=recent),
        decode=Grow(),
    )
