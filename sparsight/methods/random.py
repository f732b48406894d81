"""A control that keeps random entries."""

from sparsight.compression import Evict, Grow, Random, Uniform
from sparsight.compression.recipe import Recipe


def RandomCache(budget: float = 0.1, *, seed: int = 0) -> Recipe:
    """A control: every KV head keeps random entries and the last one.

    A method whose scores carry information must do better.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        seed: seed of the random numbers.
    """
    return Recipe("random", budget, score=Random(seed), allocate=Uniform(), reduce=Evict(recent=0), decode=Grow())
