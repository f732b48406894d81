"""The full cache."""

from sparsight.compression import Evict, Grow, Recency, Uniform
from sparsight.compression.recipe import Recipe


def Full(budget: float = 1.0) -> Recipe:
    """The full cache: no compression, on the same code path as the methods.

    The reference of comparisons within Sparsight. Every entry is kept, so the budget is always 1.

    Args:
        budget: 1. It exists so that the full cache can be made like any other method.

    Raises:
        ValueError: the budget is not 1.
    """
    recipe = Recipe("full", budget, score=Recency(), allocate=Uniform(), reduce=Evict(), decode=Grow())
    if budget != 1:
        raise ValueError(f"The full cache keeps every entry, so its budget is 1, got {budget!r}: leave the budget out.")
    return recipe
