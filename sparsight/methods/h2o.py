"""H2O."""

from sparsight.compression import Accumulated, Evict, HeavyHitter, Uniform
from sparsight.compression.recipe import Recipe


def H2O(budget: float = 0.1, *, recent: float = 0.5) -> Recipe:
    """H2O: heavy hitters, the entries with the most accumulated attention, beside the most recent ones.

    Zhang et al.: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS 2023,
    arXiv 2306.14048. The cache grows with the tokens seen, so that a budget means the same under every decode rule; the
    paper holds a fixed number.

    Args:
        budget: fraction of the tokens seen whose KV entries may be held, during prefill and decoding.
        recent: fraction of the entries held that are the most recent ones.
    """
    return Recipe(
        name="h2o",
        budget=budget,
        score=Accumulated(),
        allocate=Uniform(),
        reduce=Evict(recent=recent),
        decode=HeavyHitter(recent=recent),
    )
