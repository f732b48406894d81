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
from sparsight.compression.key_index import BlockBounds, Exact, KeyIndex, LowRank
from sparsight.compression.last_query import LastQuery
from sparsight.compression.mixkv_score import MixKV
from sparsight.compression.recall import Recall
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
DecodeRule = Grow | FixedPoint | Sliding | HeavyHitter | LastQuery | Recall

__all__ = [
    "BACON",
    "Accumulated",
    "AcrossHeads",
    "AcrossLayers",
    "Allocate",
    "BlockBounds",
    "DecodeRule",
    "DistinctValues",
    "EliteWindow",
    "Evict",
    "Exact",
    "FixedPoint",
    "FutureQueries",
    "Grow",
    "HeavyHitter",
    "KeyIndex",
    "LastQuery",
    "LastWindow",
    "LowRank",
    "MergeNearest",
    "MergeSimilar",
    "MixKV",
    "PostVision",
    "Pyramid",
    "Random",
    "Recall",
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
