"""The four kinds of part a recipe is made of: score, allocate, reduce and decode rule.

A part is a frozen dataclass of numbers whose methods are pure functions of tensors: no model, no cache, no state.
"""

from sparsight.compression.across_layers import AcrossLayers
from sparsight.compression.allocate import Pyramid, SharedMass, SparsityAware, StrengthSkewness, Uniform
from sparsight.compression.allocate_heads import AcrossHeads, VisualHeads
from sparsight.compression.elite_window import EliteWindow
from sparsight.compression.eviction import DecodeRule, FixedPoint, Grow, HeavyHitter, Sliding
from sparsight.compression.future_queries import FutureQueries
from sparsight.compression.reconstruction import Reconstruction
from sparsight.compression.reduce import Evict, MergeNearest, MergeSimilar, Reduce
from sparsight.compression.score import Accumulated, LastWindow, PostVision, Random, Recency
from sparsight.compression.temporal_change import TemporalChange

Score = (
    PostVision
    | Accumulated
    | LastWindow
    | EliteWindow
    | FutureQueries
    | Reconstruction
    | TemporalChange
    | Recency
    | Random
)
Allocate = Uniform | SparsityAware | Pyramid | SharedMass | StrengthSkewness | AcrossHeads | AcrossLayers | VisualHeads

__all__ = [
    "Accumulated",
    "AcrossHeads",
    "AcrossLayers",
    "Allocate",
    "DecodeRule",
    "EliteWindow",
    "Evict",
    "FixedPoint",
    "FutureQueries",
    "Grow",
    "HeavyHitter",
    "LastWindow",
    "MergeNearest",
    "MergeSimilar",
    "PostVision",
    "Pyramid",
    "Random",
    "Recency",
    "Reconstruction",
    "Reduce",
    "Score",
    "SharedMass",
    "Sliding",
    "SparsityAware",
    "StrengthSkewness",
    "TemporalChange",
    "Uniform",
    "VisualHeads",
]
