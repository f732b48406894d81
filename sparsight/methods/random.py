"""A control."""

from sparsight.compression import Evict, Grow, Random, Uniform
from sparsight.compression.recipe import Recipe


def RandomCache(budget: float = 0.1, *, seed: int = 0) -> Recipe:
    """A control: every KV head keeps entries by chance, and the last one.

    What a method must beat to have learnt anything from attention.

    Args:
        budget: fraction of the prompt's KV entries that may be kept.
        seed: of the random numbers.
    """
    return Recipe("random", budget, score=Random(seed), allocate=Uniform(), reduce=Evict(recent=0), decode=Grow())
