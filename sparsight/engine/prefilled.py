"""Prompts that have been processed as one batch, whose answers the engine generates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsight.cache import CompressedCache, Report
from sparsight.models.families import text_only


@dataclass(frozen=True)
class PrefilledPrompt:
    """One sequence of a cache that has processed its prompts, or a new turn of each, and nothing more.

    Args:
        cache: the cache, all of whose layers are compressed.
        sequence: which of its sequences.
        input_ids: token ids so far, ``[1, T]``, without padding.
        next_position: position of the first token of the answer.
        logits: of that token, ``[1, V]``.
        report: the cache's.
        reused_tokens: how many of them were not computed.
        seconds: time that the prompt took.
    """

    cache: CompressedCache
    sequence: int
    input_ids: Tensor
    next_position: int
    logits: Tensor
    report: Report
    reused_tokens: int = 0
    seconds: float = 0.0


def next_logits(model: Any, cache: CompressedCache, inputs: Mapping[str, Any]) -> Tensor:
    """Process the inputs that the cache has not processed yet; return the logits of the next token, ``[B, V]``."""
    if text_only(model.config):
        # Only the cache knows of vision tokens.
        inputs = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    output = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0]


def split(
    cache: CompressedCache, inputs: Mapping[str, Any], next_positions: Tensor, logits: Tensor
) -> list[PrefilledPrompt]:
    """The sequences of a batch.

    Args:
        cache: has processed ``inputs``, and nothing more.
        inputs: ``input_ids`` ``[B, T]`` and, where there is padding, their ``attention_mask``.
        next_positions: int64 ``[B]``.
        logits: of the next token, ``[B, V]``.
    """
    ids, report = inputs["input_ids"], cache.report()
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return [
        PrefilledPrompt(cache, index, ids[index, valid[index]][None], position, logits[index, None], report)
        for index, position in enumerate(next_positions.tolist())
    ]
