"""The four kinds of part a recipe is made of: score, allocate, reduce and decode rule.

A part is a frozen dataclass of numbers whose methods are pure functions of tensors: no model, no cache, no state.
"""

from sparsight.parts.allocate import Allocate, Pyramid, SharedMass, SparsityAware, Uniform
from sparsight.parts.decode import DecodeRule, FixedPoint, Grow, HeavyHitter, Sliding
from sparsight.parts.reduce import Evict, MergeNearest, MergeSimilar, Reduce
from sparsight.parts.score import Accumulated, LastWindow, PostVision, Random, Recency, Score

__all__ = [
    "Accumulated",
    "Allocate",
    "DecodeRule",
    "Evict",
    "FixedPoint",
    "Grow",
    "HeavyHitter",
    "LastWindow",
    "MergeNearest",
    "MergeSimilar",
    "PostVision",
    "Pyramid",
    "Random",
    "Recency",
    "Reduce",
    "Score",
    "SharedMass",
    "Sliding",
    "SparsityAware",
    "Uniform",
]
