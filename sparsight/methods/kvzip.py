"""KVzip."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from sparsight.compression import AcrossLayers, Evict, Grow, Reconstruction
from sparsight.compression.recipe import Recipe

INSTRUCTIONS = (
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the part of the previous context exactly, starting with ",
)
"""What comes before the first chunk that is repeated, and before each later one."""


def KVzip(
    budget: float = 0.1, *, instructions: Sequence[Sequence[int]] | None = None, chunk: int = 2000, sinks: int = 4
) -> Recipe:
    """KVzip: the entries that the model attends to when it repeats the prompt, images included.

    Kim et al.: KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, NeurIPS 2025, arXiv 2505.23416.

    Score: the largest attention that a position receives while the prompt is repeated after an instruction. Allocation:
    the heads of all layers compete. Reduction: each head keeps the sinks and evicts its lowest scores. Decoding: new
    entries are appended. The second pass of the language part costs at least as much as the first.

    From the paper and the authors' code: instructions and chunks, the maximum over queries and grouped heads, weights
    over sinks, chunk and repetition only, one selection for all heads. Different here: images are repeated as the
    embeddings that the language part was given; the complete prompt is the context, its question and the words of a
    chat template included, and no template is put around the instruction; the sinks, four entries as in kvpress instead
    of a system prompt, and the last entry always stay and count towards the budget.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over all KV heads, in (0, 1].
        instructions: token ids of what comes before the first chunk and before later ones; if None, the model's
            tokenizer makes them of :data:`INSTRUCTIONS`.
        chunk: how many tokens are repeated at a time.
        sinks: number of entries at the start of the prompt that are always kept.
    """
    ids = None if instructions is None else tuple(map(tuple, instructions))
    return Recipe(
        name="kvzip",
        budget=budget,
        score=Reconstruction(instructions=ids, chunk=chunk, sinks=sinks),
        allocate=AcrossLayers(),
        reduce=Evict(recent=0, first=sinks),
        decode=Grow(),
    )


def with_instructions(recipe: Recipe, model: str | Path) -> Recipe:
    """Add the instructions' token ids to a recipe that needs them and has none.

    Args:
        recipe: any recipe.
        model: the folder or hub id of the model that it is for, such as ``model.name_or_path``.

    Raises:
        ValueError: the model's tokenizer cannot be loaded.
    """
    score = recipe.score
    if not isinstance(score, Reconstruction) or score.instructions is not None:
        return recipe
    return replace(recipe, score=replace(score, instructions=_token_ids(str(model))))


@cache
def _token_ids(model: str) -> tuple[tuple[int, ...], ...]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        return tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in INSTRUCTIONS)
    # Loading raises OSError, ValueError, KeyError and more, from several libraries.
    except Exception as error:
        raise ValueError(
            f"KVzip's instructions need token ids, and there is no tokenizer at {model!r}: give the recipe "
            "instructions=[[...], [...]], the ids of two texts such as 'Repeat the previous context exactly.'"
        ) from error
