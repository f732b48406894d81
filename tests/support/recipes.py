"""Recipes by name with what they need to know of a tiny random model."""

import torch

from sparsight import RECIPES, recipe
from sparsight.cache.compressed_cache import compressible
from sparsight.compression import VisualHeads

STATIC = [name for name in RECIPES if not recipe(name).decode.recalls]
"""Methods whose decode steps can be captured and compiled."""

INSTRUCTIONS = ((21, 22, 23, 24), (25, 26, 27))
"""Token ids of what comes before a repeated prompt: tiny models have no tokenizer."""


def head_scores(model):
    """Scores for every KV head of a model, as a calibration would measure them."""
    config = model.get_decoder().config
    generator = torch.Generator().manual_seed(5)
    return torch.rand(len(compressible(config)), config.num_key_value_heads, generator=generator).tolist()


def recipe_for(model, name, **numbers):
    """``recipe(name)``, with head scores or instructions where the method asks for them.

    The full cache at any budget keeps all.
    """
    if name == "full":
        numbers.pop("budget", None)
    if name == "kvzip":
        numbers.setdefault("instructions", INSTRUCTIONS)
    made = recipe(name, **numbers)
    return recipe(name, heads=head_scores(model), **numbers) if isinstance(made.allocate, VisualHeads) else made
