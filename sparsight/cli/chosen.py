"""From a command's options to a recipe."""

import dataclasses
from pathlib import Path

from sparsight.calibrate import read_scores
from sparsight.cli.options import DEFAULT_MODEL
from sparsight.parts import VisualHeads
from sparsight.recipe import Recipe
from sparsight.recipes import recipe
from sparsight.zoo import head_scores_path


def chosen_recipe(model: str, method: str, budget: float, heads: Path | None, **kinds: str | None) -> Recipe:
    """A named method with other parts where ``kinds`` says so, and with the model's head scores where it needs them.

    Raises:
        ValueError: there is no such method or part, parts cannot go together, or the head scores cannot be read.
    """
    made = recipe(method, budget=budget).combined(**kinds)
    if not isinstance(made.allocate, VisualHeads):
        if heads is not None:
            raise ValueError(f"--heads is for the allocation {VisualHeads.kind!r}, which {made.name} does not have.")
        return made
    if heads is None and model == DEFAULT_MODEL:
        heads = head_scores_path()
    scores = read_scores(heads) if heads else ()
    return dataclasses.replace(made, allocate=dataclasses.replace(made.allocate, scores=scores))
