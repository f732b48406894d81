"""The full cache."""

from sparsight.compression import Evict, Grow, Recency, Uniform
from sparsight.compression.recipe import Recipe


def Full(budget: float = 1.0) -> Recipe:
    """The full cache: no compression, on the same code path as the methods.

    The reference of comparisons within Sparsight.

    Args:
        budget: fraction of the prompt's KV entries that stay.
    """
    return Recipe("full", budget, score=Recency(), allocate=Uniform(), reduce=Evict(), decode=Grow())
