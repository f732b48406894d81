"""KVzip."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from sparsight.compression import AcrossLayers, Evict, Grow, Reconstruction
from sparsight.compression.recipe import Recipe

INSTRUCTION = "\n\nRepeat the previous context exactly."


def KVzip(
    budget: float = 0.1, *, instruction: Sequence[int] | None = None, chunk: int = 2048, sinks: int = 4
) -> Recipe:
    """KVzip: the entries that the model reads when it repeats the prompt, images included, whatever the question is.

    Kim et al.: KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, NeurIPS 2025, arXiv 2505.23416.

    Score: the largest attention that a position receives while the prompt is repeated after an instruction. Allocation:
    the heads of all layers compete. Reduction: each head keeps the sinks and evicts its lowest scores. Decoding: new
    entries are appended. The second pass of the language part costs at least as much as the first.

    From the paper and the authors' code: the instruction, the maximum over queries and grouped heads, weights over
    sinks, chunk and repetition only, one threshold for all heads. Not from them: images, which are repeated as the
    embeddings that the language part was given; the complete prompt is the context, its question and the words of a
    chat template included, and no template is put around the instruction; later chunks have the same instruction,
    without the last tokens of the chunk before; sinks, instead of a system prompt, always stay, and so does the last
    entry.

    Args:
        budget: fraction of the prompt's KV entries to keep, averaged over all KV heads, in (0, 1].
        instruction: token ids of what comes before the repetition; if None, the model's tokenizer makes them of
            "Repeat the previous context exactly."
        chunk: how many tokens are repeated at a time.
        sinks: number of entries at the start of the prompt that are always kept.
    """
    ids = None if instruction is None else tuple(instruction)
    return Recipe(
        name="kvzip",
        budget=budget,
        score=Reconstruction(instruction=ids, chunk=chunk, sinks=sinks),
        allocate=AcrossLayers(),
        reduce=Evict(recent=0, first=sinks),
        decode=Grow(),
    )


def with_instruction(recipe: Recipe, model: str | Path) -> Recipe:
    """Add the instruction's token ids to a recipe that needs them and has none.

    Args:
        recipe: any recipe.
        model: the folder or hub id of the model that it is for, such as ``model.name_or_path``.

    Raises:
        ValueError: the model's tokenizer cannot be loaded.
    """
    score = recipe.score
    if not isinstance(score, Reconstruction) or score.instruction is not None:
        return recipe
    return replace(recipe, score=replace(score, instruction=_token_ids(str(model))))


@cache
def _token_ids(model: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    try:
        return tuple(AutoTokenizer.from_pretrained(model)(INSTRUCTION, add_special_tokens=False)["input_ids"])
    # Loading raises OSError, ValueError, KeyError and more, from several libraries.
    except Exception as error:
        raise ValueError(
            f"KVzip's instruction needs token ids, and there is no tokenizer at {model!r}: give the recipe "
            "instruction=[...], the ids of a sentence such as 'Repeat the previous context exactly.'"
        ) from error
