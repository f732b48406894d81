"""How much memory a request may need, known before its prompt is processed."""

from typing import Any

import torch

from sparsight.cache.host_copy import stored_bytes
from sparsight.cache.kv_pool import slot_bytes
from sparsight.cache.pool_rows import rounded_up
from sparsight.compression.recipe import Recipe


def most_bytes(config: Any, dtype: torch.dtype, recipe: Recipe, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes that one answer holds at its longest.

    Args:
        config: the config of the model's language part.
        dtype: of keys and values.
        recipe: how the prompt is compressed.
        prompt_tokens: length of the prompt.
        new_tokens: length of the longest answer.
    """
    # A budget of vision tokens is counted as if there were none, as the full length.
    budget = recipe.fitted(prompt_tokens, 0).budget
    kept = min(round(budget * prompt_tokens) + 1, prompt_tokens)
    return rounded_up(kept + new_tokens) * config.num_hidden_layers * token_bytes(config, dtype)


def copied_bytes(config: Any, dtype: torch.dtype, recipe: Recipe, prompt_tokens: int, host_dtype: str | None) -> int:
    """Bytes of the full prompt that the answers to it recall from; 0 unless the decode rule recalls.

    Args:
        config: the config of the model's language part.
        dtype: of keys and values.
        recipe: how the prompt is compressed.
        prompt_tokens: length of the prompt.
        host_dtype: as :class:`~sparsight.CompressedCache` takes it.
    """
    if not recipe.decode.recalls:
        return 0
    size, heads = _sizes(config)
    return prompt_tokens * config.num_hidden_layers * heads * stored_bytes(size, dtype.itemsize, host_dtype)


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token in one layer of a language part, in all KV heads."""
    size, heads = _sizes(config)
    return heads * slot_bytes(size, size, dtype)


def _sizes(config: Any) -> tuple[int, int]:
    """Size and number of KV heads."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
