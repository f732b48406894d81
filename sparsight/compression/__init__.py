"""The four kinds of part a recipe is made of: score, allocate, reduce and decode rule.

A part is a frozen dataclass of numbers whose methods are pure functions of tensors: no model, no cache, no state.
"""

from sparsight.compression.across_layers import AcrossLayers
from sparsight.compression.allocate import Pyramid, SharedMass, SparsityAware, StrengthSkewness, Uniform
from sparsight.compression.allocate_heads import AcrossHeads, VisualHeads
from sparsight.compression.bacon_score import BACON
from sparsight.compression.distinct_values import DistinctValues
from sparsight.compression.elite_window import EliteWindow
from sparsight.compression.eviction import FixedPoint, Grow, HeavyHitter, Sliding
from sparsight.compression.future_queries import FutureQueries
from sparsight.compression.last_query import LastQuery
from sparsight.compression.mixkv_score import MixKV
from sparsight.compression.reconstruction import Reconstruction
from sparsight.compression.reduce import Evict, MergeNearest, MergeSimilar, Reduce
from sparsight.compression.score import Accumulated, LastWindow, PostVision, Random, Recency
from sparsight.compression.temporal_change import TemporalChange
from sparsight.compression.text_grounded import TextGrounded, TextVision

Score = (
    PostVision
    | Accumulated
    | LastWindow
    | EliteWindow
    | TextGrounded
    | MixKV
    | BACON
    | FutureQueries
    | Reconstruction
    | TemporalChange
    | DistinctValues
    | Recency
    | Random
)
Allocate = (
    Uniform
    | SparsityAware
    | Pyramid
    | SharedMass
    | StrengthSkewness
    | TextVision
    | AcrossHeads
    | AcrossLayers
    | VisualHeads
)
DecodeRule = Grow | FixedPoint | Sliding | HeavyHitter | LastQuery

__all__ = [
    "BACON",
    "Accumulated",
    "AcrossHeads",
    "AcrossLayers",
    "Allocate",
    "DecodeRule",
    "DistinctValues",
    "EliteWindow",
    "Evict",
    "FixedPoint",
    "FutureQueries",
    "Grow",
    "HeavyHitter",
    "LastQuery",
    "LastWindow",
    "MergeNearest",
    "MergeSimilar",
    "MixKV",
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
    "TextGrounded",
    "TextVision",
    "Uniform",
    "VisualHeads",
]
