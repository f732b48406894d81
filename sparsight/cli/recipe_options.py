"""From a command's options to a recipe."""

import dataclasses
from pathlib import Path

from sparsight.cli.options import DEFAULT_MODEL
from sparsight.compression import VisualHeads
from sparsight.compression.recipe import Recipe
from sparsight.methods import recipe
from sparsight.reader import head_scores_path
from sparsight.utils.head_scores import read_scores


def recipe_from_options(model: str, method: str, budget: float, heads: Path | None, **kinds: str | None) -> Recipe:
    """A named method with other parts where ``kinds`` says so, and with the model's head scores where it needs them.

    Raises:
        ValueError: there is no such method or part, parts cannot go together, or the head scores cannot be read.
    """
    made = recipe(method, budget=budget).combined(**kinds)
    if heads is not None and not isinstance(made.allocate, VisualHeads):
        raise ValueError(f"--heads is for the allocation {VisualHeads.kind!r}, which {made.name} does not have.")
    return with_scores(made, model, heads)


def with_scores(made: Recipe, model: str, heads: Path | None) -> Recipe:
    """A recipe with a model's head scores, if it needs any and there are some: those in a file, or those that ship."""
    if heads is None and model == DEFAULT_MODEL:
        heads = head_scores_path()
    if heads is None or not isinstance(made.allocate, VisualHeads):
        return made
    return dataclasses.replace(made, allocate=dataclasses.replace(made.allocate, scores=read_scores(heads)))
