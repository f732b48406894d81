"""The four kinds of part a recipe is made of: score, allocate, reduce and decode rule.

A part is a frozen dataclass of numbers whose methods are pure functions of tensors: no model, no cache, no state.
"""

from sparsight.compression.allocate import Pyramid, SharedMass, SparsityAware, StrengthSkewness, Uniform
from sparsight.compression.allocate_heads import AcrossHeads, VisualHeads
from sparsight.compression.bacon_score import BACON
from sparsight.compression.elite_window import EliteWindow
from sparsight.compression.eviction import FixedPoint, Grow, HeavyHitter, Sliding
from sparsight.compression.last_query import LastQuery
from sparsight.compression.mixkv_score import MixKV
from sparsight.compression.reduce import Evict, MergeNearest, MergeSimilar, Reduce
from sparsight.compression.score import Accumulated, LastWindow, PostVision, Random, Recency
from sparsight.compression.text_grounded import TextGrounded, TextVision

Score = PostVision | Accumulated | LastWindow | EliteWindow | TextGrounded | MixKV | BACON | Recency | Random
Allocate = Uniform | SparsityAware | Pyramid | SharedMass | StrengthSkewness | TextVision | AcrossHeads | VisualHeads
DecodeRule = Grow | FixedPoint | Sliding | HeavyHitter | LastQuery

__all__ = [
    "BACON",
    "Accumulated",
    "AcrossHeads",
    "Allocate",
    "DecodeRule",
    "EliteWindow",
    "Evict",
    "FixedPoint",
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
    "Reduce",
    "Score",
    "SharedMass",
    "Sliding",
    "SparsityAware",
    "StrengthSkewness",
    "TextGrounded",
    "TextVision",
    "Uniform",
    "VisualHeads",
]
