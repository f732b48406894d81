"""Recipes by name with what they need to know of a tiny random model."""

import torch

from sparsight import recipe
from sparsight.cache.compressed_cache import compressible
from sparsight.compression import VisualHeads


def head_scores(model):
    """Scores for every KV head of a model, as a calibration would measure them."""
    config = model.get_decoder().config
    generator = torch.Generator().manual_seed(5)
    return torch.rand(len(compressible(config)), config.num_key_value_heads, generator=generator).tolist()


def recipe_for(model, name, **numbers):
    """``recipe(name)``, with head scores where the method asks for them; the full cache at any budget keeps all."""
    if name == "full":
        numbers.pop("budget", None)
    made = recipe(name, **numbers)
    return recipe(name, heads=head_scores(model), **numbers) if isinstance(made.allocate, VisualHeads) else made
