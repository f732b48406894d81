"""Head-wise allocations: KV heads of one layer keep different numbers of entries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.compression.allocate import KeepRatio, LayerStatistics, gather_to_cpu, water_fill
from sparsight.utils import checks


@dataclass(frozen=True)
class AcrossHeads:
    """Layers keep the same share; in each the best of all heads' entries stay (AdaKV, arXiv 2407.11550, algorithm 1).

    One selection over all heads of a layer counts how many of the best entries are each head's. Entries that always
    stay are among them.

    Args:
        floor: fraction of the equal share that every head has; the rest is shared by those counts.
        normalize: before the selection over all heads, weight each head by the share of its scores that its equal part
            of the budget holds. An option of the authors' code, off by default there.
    """

    kind: ClassVar[str] = "across-heads"
    head_wise: ClassVar[bool] = True
    threshold: ClassVar[float | None] = None
    floor: float = 0.2
    normalize: bool = False

    def __post_init__(self) -> None:
        checks.fraction("floor", self.floor, zero=True)

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each KV head of each layer keeps."""
        length = layers[0].score.shape[1]
        equal = max(1, round(budget * length))
        chosen = gather_to_cpu(self._chosen(layer, equal) for layer in layers).tolist()
        counts = (round_to_sum([self.floor * equal + (1 - self.floor) * best for best in heads]) for heads in chosen)
        return [[count / length for count in heads] for heads in counts]

    def _chosen(self, layer: LayerStatistics, equal: int) -> Tensor:
        """How many of the best entries of a layer are each head's, of as many as all heads keep in sum, ``[H_kv]``."""
        heads, length = layer.score.shape
        always = layer.always.to(layer.score.device, non_blocking=True)
        score = layer.score
        if self.normalize:
            others = score.masked_fill(always, 0)
            count = max(equal - int(layer.always.sum()), 0)
            held = others.topk(count).values.sum(-1, keepdim=True)
            score = score * held / others.sum(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
        score = score.masked_fill(always, torch.inf)
        best = score.flatten().sort(descending=True, stable=True).indices[: heads * equal] // length
        # Unlike bincount, this does not wait for a GPU.
        return best.new_zeros(heads).scatter_add_(0, best, torch.ones_like(best))


@dataclass(frozen=True)
class VisualHeads:
    """Heads that read images keep more, by scores measured once a model (SparseMM, arXiv 2506.05344).

    Every head has what always stays, such as the window. Of the rest of the budget a fraction is shared equally and the
    remainder by score. What a head cannot hold goes to the others.

    Args:
        scores: of each compressed layer's KV heads, at least 0 (see :func:`sparsight.eval.calibration.head_scores`).
        equal: fraction of the rest that is shared equally (the paper's ``rho``).
    """

    kind: ClassVar[str] = "visual-heads"
    head_wise: ClassVar[bool] = True
    threshold: ClassVar[float | None] = None
    scores: tuple[tuple[float, ...], ...] = ()
    equal: float = 0.1

    def __post_init__(self) -> None:
        checks.fraction("equal", self.equal, zero=True)
        try:
            scores = tuple(tuple(layer) for layer in self.scores)
            numbers = [score for layer in scores for score in layer]
            valid = len({len(layer) for layer in scores}) < 2 and all(math.isfinite(n) and n >= 0 for n in numbers)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError("Head scores must be as many numbers of at least 0 for every layer, one for each KV head.")
        # JSON brings lists, which a frozen part must not hold.
        object.__setattr__(self, "scores", scores)

    def check_model(self, layers: int, heads: int) -> None:
        """Raise ValueError unless there are scores for ``layers`` compressed layers of ``heads`` KV heads each."""
        found = (len(self.scores), len(self.scores[0]) if self.scores else 0)
        if found != (layers, heads):
            measured = f"those given are of {found[0]} layers with {found[1]}" if self.scores else "none were given"
            raise ValueError(
                f"Allocation {self.kind!r} needs head scores of this model's {layers} layers with {heads} KV heads, "
                f"and {measured}: measure them once with `sparsight calibrate`."
            )

    def shares(self, layers: Sequence[LayerStatistics], budget: float) -> list[KeepRatio]:
        """Share of the prompt's entries that each KV head of each layer keeps."""
        scores = torch.tensor(self.scores, dtype=torch.float64)
        always = layers[0].always
        window = min(int(always.sum()) / len(always), budget)
        least = window + self.equal * (budget - window)
        if least == 1:
            return torch.ones_like(scores).tolist()
        rest = water_fill(scores.flatten(), (budget - least) / (1 - least) * scores.numel(), 0.0)
        return (least + (1 - least) * rest).view_as(scores).tolist()


def round_to_sum(numbers: Sequence[float]) -> list[int]:
    """Integers near ``numbers`` with the same sum, itself an integer: the largest remainders are rounded up."""
    floors = [math.floor(number) for number in numbers]
    # Floating-point errors must not order remainders that are equal.
    by_remainder = sorted(range(len(floors)), key=lambda index: round(floors[index] - numbers[index], 9))
    for index in by_remainder[: round(sum(numbers) - sum(floors))]:
        floors[index] += 1
    return floors
