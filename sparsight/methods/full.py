"""The full cache."""

from sparsight.compression import Evict, Grow, Recency, Uniform
from sparsight.compression.recipe import Recipe


def Full(budget: float = 1.0) -> Recipe:
    """No compression: every entry stays, on the same path as the methods.

    For comparisons within Sparsight; a lower budget keeps the most recent entries.

    Args:
        budget: fraction of the prompt's KV entries that stay.
    """
    return Recipe("full", budget, score=Recency(), allocate=Uniform(), reduce=Evict(), decode=Grow())
