"""An allocation for which the KV heads of all layers compete."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsight.compression.allocate import KeepRatio, LayerStatistics, gather_to_cpu
from sparsight.compression.allocate_heads import round_to_sum
from sparsight.utils import checks


@dataclass(frozen=True)
class AcrossLayers:
    """The best entries of all heads in all layers stay (KVzip, arXiv 2505.23416, section 3.3).

    One selection over all layers counts how many of the best entries are each head's. Entries that always stay are
    among them. Scores must mean the same in every layer, as attention weights do.

    Args:
        floor: fraction of the equal share that every head has; the rest is shared by those counts. The paper has none.
    """

    kind: ClassVar[str] = "across-layers"
    head_wise: ClassVar[bool] = True
    threshold: ClassVar[float | None] = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        checks.fraction("floor", self.floor, zero=True)

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each KV head of each layer keeps."""
        scores = gather_to_cpu(layer.score for layer in layers)
        number, heads, length = scores.shape
        always = int(layers[0].always.sum())
        total = max(number * heads * always, round(budget * scores.numel()))
        ranked = scores.masked_fill(layers[0].always, torch.inf).flatten().sort(descending=True, stable=True).indices
        best = torch.bincount(ranked[:total] // length, minlength=number * heads)
        equal = total / len(best)
        counts = round_to_sum([self.floor * equal + (1 - self.floor) * count for count in best.tolist()])
        return [[count / length for count in counts[first : first + heads]] for first in range(0, len(counts), heads)]
