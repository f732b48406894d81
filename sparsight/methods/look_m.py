"""LOOK-M."""

from sparsight.compression import Accumulated, Grow, MergeSimilar, Uniform
from sparsight.compression.recipe import Recipe


def LookM(budget: float = 0.1, *, merge: str = "pivotal", recent: float = 0.5) -> Recipe:
    """LOOK-M: text before vision; each dropped entry is merged into the kept entry with the most similar key.

    Wan et al.: LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference, arXiv
    2406.18139.

    Score: accumulated attention, with every text token above every vision token. Allocation: the same budget for each
    layer. Reduction: recent entries and the highest scores are kept, the others merge into them. Decoding: new entries
    are appended.

    From the paper: the scores (equations 4 to 8), half of the budget recent, three ways to merge (equations 10 to 12),
    of which ``pivotal`` is its default. From the authors' code (``modify_llama.py``): the pivotal merge is the same.
    Not from the code: it keeps all text, also beyond the budget, and merges in the other two ways only part of what is
    dropped. Here text is capped by the budget and everything dropped is merged, as in the paper. Attention of the query
    heads that share a KV head is averaged, which neither has.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        merge: ``pivotal``, ``averaged`` or ``weighted``, see :class:`~sparsight.compression.MergeSimilar`.
        recent: fraction of a layer's entries that are reserved for the most recent ones.
    """
    return Recipe(
        name="look-m",
        budget=budget,
        score=Accumulated(text_first=True),
        allocate=Uniform(),
        reduce=MergeSimilar(merge=merge, recent=recent),
        decode=Grow(),
    )
