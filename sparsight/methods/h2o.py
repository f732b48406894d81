"""H2O."""

from sparsight.compression import Accumulated, Evict, HeavyHitter, Uniform
from sparsight.compression.recipe import Recipe


def H2O(budget: float = 0.1, *, recent: float = 0.5) -> Recipe:
    """H2O: heavy hitters, the entries with the highest accumulated attention, and the most recent entries.

    Zhang et al.: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS 2023,
    arXiv 2306.14048.

    Score: accumulated attention over all queries, those of decoding included. Allocation: the same budget for each
    layer. Reduction: each KV head keeps its recent entries and evicts the lowest scores. Decoding: each new entry that
    exceeds the budget replaces the entry with the lowest score.

    From the paper: scores that also accumulate during decoding, half of the cache recent and half heavy hitters
    (algorithm 1). From the authors' code (``utils_real_drop/modify_llama.py``): the selection after the prompt, and
    scores that leave with their entries. Not from either: the cache has a fixed size there; here it grows with the
    tokens seen, so that a budget means the same for all decode rules. There a new token attends before an entry leaves;
    here the entry leaves first. Attention of the query heads that share a KV head is averaged.

    Args:
        budget: fraction of the tokens seen whose KV entries a layer may hold, after prefill and during decoding.
        recent: fraction of the entries held that are reserved for the most recent ones.
    """
    return Recipe(
        name="h2o",
        budget=budget,
        score=Accumulated(),
        allocate=Uniform(),
        reduce=Evict(recent=recent),
        decode=HeavyHitter(recent=recent),
    )
