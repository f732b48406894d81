"""Sparsight with recall."""

from dataclasses import replace
from typing import Any

from sparsight.compression import Exact, KeyIndex, Recall
from sparsight.compression.recipe import Recipe
from sparsight.compression.score import Window
from sparsight.methods.sparsight import Sparsight


def SparsightRecall(
    budget: float = 0.1,
    *,
    every: int = 4,
    index: KeyIndex = Exact(),  # noqa: B008  # frozen
    pool: Window = (1, 7),
    prior: float = 1.0,
    floor: float = 0.6,
    **numbers: Any,
) -> Recipe:
    """Sparsight with recall: what decoding attends to is fetched from the full cache, which lies in host memory.

    The project's own method: ``sparsight``, whose heads share more of the budget equally. New entries are appended, and
    every few tokens the newest query ranks all positions of the prompt, by the attention that they or their neighbours
    receive plus their score at the prompt's end; entries that rank highest replace those that rank lowest. The numbers
    were measured on the shipped model (benchmarks/recall.py).

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over all KV heads, in (0, 1].
        every: tokens from one ranking to the next.
        index: what the ranking knows of the keys.
        pool: height and width of the ranking's pooling window, odd numbers; a width along the sequence if it is one.
        prior: weight of the score at the prompt's end.
        floor: fraction of the budget that all heads share equally, in [0, 1].
        numbers: further arguments of :func:`Sparsight`.
    """
    recipe = Sparsight(budget, floor=floor, **numbers)
    return replace(recipe, name="sparsight-recall", decode=Recall(every, index, pool, prior=prior))
