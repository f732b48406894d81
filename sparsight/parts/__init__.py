"""The four kinds of part a recipe is made of: score, allocate, reduce and decode rule.

A part is a frozen dataclass of numbers whose methods are pure functions of tensors: no model, no cache, no state.
"""

from sparsight.parts.allocate import Allocate, SparsityAware, Uniform
from sparsight.parts.decode import DecodeRule, FixedPoint, Grow
from sparsight.parts.reduce import Evict, MergeNearest, Reduce
from sparsight.parts.score import Accumulated, PostVision, Score

__all__ = [
    "Accumulated",
    "Allocate",
    "DecodeRule",
    "Evict",
    "FixedPoint",
    "Grow",
    "MergeNearest",
    "PostVision",
    "Reduce",
    "Score",
    "SparsityAware",
    "Uniform",
]
