"""Sparsight: compressed KV caches for vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsight.batch_inference.api import batch
    from sparsight.cache import CompressedCache
    from sparsight.cache.report import Report
    from sparsight.compression import BACON, MixKV
    from sparsight.compression.recipe import Recipe
    from sparsight.engine.engine import Engine
    from sparsight.engine.generate import generate
    from sparsight.engine.request import Completion, Handle, RequestError
    from sparsight.engine.sampling import SamplingParams
    from sparsight.methods import (
        RECIPES,
        TGVKV,
        ElasticCache,
        ExpectedAttention,
        InfiniPotV,
        KVzip,
        Sparsight,
        VLCache,
        recipe,
    )
    from sparsight.models.loading import load

__all__ = [
    "BACON",
    "RECIPES",
    "TGVKV",
    "Completion",
    "CompressedCache",
    "ElasticCache",
    "Engine",
    "ExpectedAttention",
    "Handle",
    "InfiniPotV",
    "KVzip",
    "MixKV",
    "Recipe",
    "Report",
    "RequestError",
    "SamplingParams",
    "Sparsight",
    "VLCache",
    "batch",
    "generate",
    "load",
    "recipe",
]

_MODULES = {
    "BACON": "sparsight.compression",
    "RECIPES": "sparsight.methods",
    "TGVKV": "sparsight.methods",
    "Completion": "sparsight.engine.request",
    "CompressedCache": "sparsight.cache",
    "ElasticCache": "sparsight.methods",
    "Engine": "sparsight.engine.engine",
    "ExpectedAttention": "sparsight.methods",
    "Handle": "sparsight.engine.request",
    "InfiniPotV": "sparsight.methods",
    "KVzip": "sparsight.methods",
    "MixKV": "sparsight.compression",
    "Recipe": "sparsight.compression.recipe",
    "Report": "sparsight.cache.report",
    "RequestError": "sparsight.engine.request",
    "SamplingParams": "sparsight.engine.sampling",
    "Sparsight": "sparsight.methods",
    "VLCache": "sparsight.methods",
    "batch": "sparsight.batch_inference.api",
    "generate": "sparsight.engine.generate",
    "load": "sparsight.models.loading",
    "recipe": "sparsight.methods",
}
"""Where the public names are defined: their modules import torch, which takes seconds, when a name is first used."""


__version__: str

# Type checkers read the imports above; with this function they would accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name, or look up ``__version__``, on first use."""
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("sparsight")
        elif name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
