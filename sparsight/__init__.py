"""Sparsight: compressed KV caches for vision-language models."""

from sparsight.batch_inference.api import batch
from sparsight.cache import CompressedCache
from sparsight.cache.report import Report
from sparsight.compression.recipe import Recipe
from sparsight.engine.model_runner import generate
from sparsight.methods import RECIPES, ElasticCache, Sparsight, VLCache, recipe
from sparsight.models.loading import load

__all__ = [
    "RECIPES",
    "CompressedCache",
    "ElasticCache",
    "Recipe",
    "Report",
    "Sparsight",
    "VLCache",
    "batch",
    "generate",
    "load",
    "recipe",
]
