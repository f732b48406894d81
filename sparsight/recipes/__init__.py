"""The published methods by name, one short file each."""

from collections.abc import Callable
from typing import Any

from sparsight.recipe import Recipe
from sparsight.recipes.elastic import ElasticCache
from sparsight.recipes.vl_cache import VLCache
from sparsight.suggest import unknown

RECIPES: dict[str, Callable[..., Recipe]] = {
    "vl-cache": VLCache,
    "elastic": ElasticCache,
}


def recipe(name: str, **numbers: Any) -> Recipe:
    """A named method's recipe: ``recipe("vl-cache", budget=0.1)``.

    Raises:
        ValueError: no method has this name, or it has no such number, or a number is out of range.
    """
    if name not in RECIPES:
        raise unknown("method", name, RECIPES)
    try:
        return RECIPES[name](**numbers)
    except TypeError as error:
        raise ValueError(f"Method {name!r}: {error}.") from error


__all__ = ["RECIPES", "ElasticCache", "VLCache", "recipe"]
