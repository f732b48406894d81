"""Sparsight: compressed KV caches for vision-language models."""

from sparsight.cache import CompressedCache
from sparsight.captured import generate
from sparsight.offline.run import batch
from sparsight.recipe import Recipe
from sparsight.recipes import RECIPES, ElasticCache, Sparsight, VLCache, recipe
from sparsight.report import Report

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
    "recipe",
]
