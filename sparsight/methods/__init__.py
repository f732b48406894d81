"""The compression methods by name, one file per method."""

from collections.abc import Callable
from typing import Any

from sparsight.compression.recipe import Recipe
from sparsight.methods.adakv import AdaKV
from sparsight.methods.aircache import AirCache
from sparsight.methods.bacon import BACONCache
from sparsight.methods.elastic import ElasticCache
from sparsight.methods.expected_attention import ExpectedAttention
from sparsight.methods.full import Full
from sparsight.methods.h2o import H2O
from sparsight.methods.infinipot_v import InfiniPotV
from sparsight.methods.kvzip import KVzip, with_instructions
from sparsight.methods.look_m import LookM
from sparsight.methods.mixkv import MixKVCache
from sparsight.methods.prefixkv import PrefixKV
from sparsight.methods.pyramidkv import PyramidKV
from sparsight.methods.random import RandomCache
from sparsight.methods.snapkv import SnapKV
from sparsight.methods.sparsemm import SparseMM, with_shipped_scores
from sparsight.methods.sparsight import Sparsight
from sparsight.methods.sparsight_recall import SparsightRecall
from sparsight.methods.streaming_llm import StreamingLLM
from sparsight.methods.tgv_kv import TGVKV
from sparsight.methods.vl_cache import VLCache
from sparsight.utils.method_names import ALIASES, METHODS
from sparsight.utils.suggest import unknown

RECIPES: dict[str, Callable[..., Recipe]] = {name: globals()[function] for name, function in METHODS.items()}
"""The methods by name."""


def recipe(name: str, **numbers: Any) -> Recipe:
    """The recipe of a method by name: ``recipe("vl-cache", budget=0.1)``.

    Raises:
        ValueError: there is no such method, or it has no such parameter, or a value is out of range.
    """
    name = ALIASES.get(name, name)
    if name not in RECIPES:
        raise unknown("method", name, RECIPES)
    try:
        return RECIPES[name](**numbers)
    except TypeError as error:
        raise ValueError(f"Method {name!r}: {error}.") from error


__all__ = [
    "H2O",
    "RECIPES",
    "TGVKV",
    "AdaKV",
    "AirCache",
    "BACONCache",
    "ElasticCache",
    "ExpectedAttention",
    "Full",
    "InfiniPotV",
    "KVzip",
    "LookM",
    "MixKVCache",
    "PrefixKV",
    "PyramidKV",
    "RandomCache",
    "SnapKV",
    "SparseMM",
    "Sparsight",
    "SparsightRecall",
    "StreamingLLM",
    "VLCache",
    "recipe",
    "with_instructions",
    "with_shipped_scores",
]
