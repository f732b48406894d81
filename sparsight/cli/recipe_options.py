"""From a command's options to a recipe."""

import dataclasses
from pathlib import Path

from sparsight import methods
from sparsight.compression import VisualHeads
from sparsight.compression.recipe import Recipe
from sparsight.utils.head_scores import read_scores


def recipe_from_options(
    model: str, method: str, budget: float | None, heads: Path | None, **kinds: str | None
) -> Recipe:
    """A method's recipe with the parts that ``kinds`` replaces, and with the model's head scores if it needs them.

    Without ``budget`` it has the method's own.

    Raises:
        ValueError: there is no such method or part, the parts cannot be combined, or the head scores cannot be read.
    """
    numbers = {} if budget is None else {"budget": budget}
    combined = methods.recipe(method, **numbers).combined(**kinds)
    if heads is not None and not isinstance(combined.allocate, VisualHeads):
        raise ValueError(f"--heads is for the allocation {VisualHeads.kind!r}, which {combined.name} does not have.")
    return with_scores(combined, model, heads)


def with_scores(recipe: Recipe, model: str | None, heads: Path | None) -> Recipe:
    """A recipe with head scores if its allocation uses them: those of ``heads``, or those of the model that ships."""
    if heads is None:
        return recipe if model is None else methods.with_shipped_scores(recipe, model)
    if not isinstance(recipe.allocate, VisualHeads):
        return recipe
    return dataclasses.replace(recipe, allocate=dataclasses.replace(recipe.allocate, scores=read_scores(heads)))
