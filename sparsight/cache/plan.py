"""Stage 2, plan: how many entries each layer keeps, once every layer has been observed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsight.cache.prefill import Prefill
from sparsight.compression.allocate import KeepRatio, gather_to_cpu


@dataclass(frozen=True)
class Plan:
    """What every layer keeps of every sequence.

    Attributes:
        sparsity: by layer and sequence; 0 where the allocation does not measure it.
        ratios: share of the prompt's entries to keep, by layer and sequence.
    """

    sparsity: list[list[float]]
    ratios: list[list[KeepRatio]]


def make_plan(prefills: Sequence[Prefill]) -> Plan:
    """The plan for layers that have seen the complete prompt; waits for the GPU a constant number of times."""
    finish(prefills)
    counts = gather_to_cpu(torch.stack([prefill.zeroed, prefill.visible]) for prefill in prefills)
    sparsity = [_sparsity(prefill, *layer) for prefill, layer in zip(prefills, counts.tolist(), strict=True)]
    recipe = prefills[0].recipe
    by_sequence = []
    for sequence in range(len(prefills[0].prompt.spans)):
        layers = zip(prefills, sparsity, strict=True)
        statistics = [prefill.statistics(sequence, values[sequence]) for prefill, values in layers]
        by_sequence.append(recipe.allocate.shares(statistics, recipe.budget))
    return Plan(sparsity, [list(layer) for layer in zip(*by_sequence, strict=True)])


def finish(prefills: Sequence[Prefill]) -> None:
    """Turn what each layer has accumulated into scores, from the first layer to the last."""
    earlier: list[list[Tensor]] = [[] for _ in prefills[0].prompt.spans]
    for prefill in prefills:
        prefill.finish(earlier)


def _sparsity(prefill: Prefill, zeroed: Sequence[int], visible: Sequence[int]) -> list[float]:
    """Sparsity of each sequence's post-vision queries (VL-Cache, arXiv 2410.23317, section 4.1).

    Raises:
        ValueError: the attention holds NaN: the largest weight of a row of numbers always survives.
    """
    if any(count == every > 0 for count, every in zip(zeroed, visible, strict=True)):
        raise ValueError(f"The attention holds NaN, in {prefill.keys.dtype}: try a dtype of a wider range.")
    return [count / max(every, 1) for count, every in zip(zeroed, visible, strict=True)]
