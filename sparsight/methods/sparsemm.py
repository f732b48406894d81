"""SparseMM."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsight.compression import Evict, Grow, LastWindow, VisualHeads
from sparsight.compression.recipe import Recipe
from sparsight.reader import head_scores_path, model_path
from sparsight.utils.head_scores import read_scores


def SparseMM(
    budget: float = 0.1,
    *,
    heads: str | Path | Sequence[Sequence[float]] = (),
    window: int = 32,
    pool: int = 5,
    pooling: str = "average",
    equal: float = 0.1,
) -> Recipe:
    """SparseMM: visual heads, those that read text in images, keep more entries; they are found once per model.

    Wang et al.: SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs, ICCV 2025, arXiv 2506.05344.

    Score: pooled attention of the last queries, as in SnapKV. Allocation: every KV head is given the window and an
    equal part of the remaining budget; the rest is shared in proportion to the head scores. Reduction: each head keeps
    the window and evicts its lowest scores. Decoding: new entries are appended.

    From the paper: the three parts of a head's budget (section 3.3). From the authors' code (``sparsemm_utils.py``):
    average pooling of width 5, attention averaged over the query heads that share a KV head. Not from the code: it
    rounds each head's budget by itself, and what exceeds the prompt is lost; here it goes to the other heads. How the
    head scores differ: :func:`sparsight.eval.calibration.head_scores`.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over all KV heads, in (0, 1].
        heads: score of each layer's KV heads, or the path of a file that ``sparsight calibrate`` wrote. If left out,
            :func:`with_shipped_scores` can add those of the shipped model.
        window: number of last queries whose attention is summed and whose own entries are always kept; at most two
            thirds of the entries that the budget allows.
        pool: width of the pooling along the sequence, an odd number.
        pooling: ``average`` or ``max``.
        equal: fraction of the budget beyond the window that is shared equally (the paper's ``rho``).

    Raises:
        ValueError: a number is out of range, or the file cannot be read, or ``heads`` or the file are not head scores.
    """
    scores: Any = read_scores(heads) if isinstance(heads, str | Path) else heads
    return Recipe(
        name="sparsemm",
        budget=budget,
        score=LastWindow(window=window, pool=pool, pooling=pooling),
        allocate=VisualHeads(scores=scores, equal=equal),
        reduce=Evict(recent=0, last=window),
        decode=Grow(),
    )


def with_shipped_scores(recipe: Recipe, model: str | Path) -> Recipe:
    """Add the shipped model's head scores to a recipe that needs head scores and has none.

    Args:
        recipe: any recipe.
        model: the folder or hub id of the model that it is for, such as ``model.name_or_path``.

    Returns:
        The recipe with the scores if the model is the one that ships, otherwise the recipe unchanged.
    """
    allocate = recipe.allocate
    if not isinstance(allocate, VisualHeads) or allocate.scores or Path(model) != model_path():
        return recipe
    return replace(recipe, allocate=replace(allocate, scores=read_scores(head_scores_path())))
