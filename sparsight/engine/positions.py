"""Explicit position ids of a prompt and of the tokens that follow it.

Given position ids, a model neither counts the entries of its cache nor remembers an offset of the last prompt
(``rope_deltas``), so that sequences of any length can join and leave a batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.models.families import family_of


def prompt_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Position ids of a prompt and the position of the first token that follows it.

    The last dimension counts tokens: a chunk of the prompt takes ``position_ids[..., start:stop]``.

    Args:
        model: the model; only its config is used.
        inputs: what the processor returned for one prompt of ``T`` tokens.

    Returns:
        ``position_ids`` ``[1, T]``, or ``[3, 1, T]`` (time, height and width) for a model with multimodal RoPE, and the
        next position: one more than the last token's. After a prompt that ends in an image it is one more than the
        largest of the three; ``generate`` would continue each axis from its own.

    Raises:
        ValueError: there is more than one prompt, padding, or no ``mm_token_type_ids`` where images have a grid.
    """
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if len(input_ids) != 1 or (mask is not None and not mask.all()):
        raise ValueError(f"Positions are those of one prompt without padding, got input_ids {list(input_ids.shape)}.")
    positions = _positions(model, inputs)
    return positions, int(positions[..., -1].max()) + 1


def next_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Position of the token that follows each prompt of a batch, int64 ``[B]``.

    Args:
        model: the model; only its config is used.
        inputs: what the processor returned for the prompts, padded on the left.
    """
    last = _positions(model, inputs)[..., -1]
    return last.reshape(-1, len(inputs["input_ids"])).amax(0) + 1


def _positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Position ids of prompts, ``[B, T]`` or ``[3, B, T]``; those of padding are arbitrary."""
    if _has_multimodal_rope(model) and any(inputs.get(f"{kind}_grid_thw") is not None for kind in ("image", "video")):
        if inputs.get("mm_token_type_ids") is None:
            raise ValueError("Positions of images need mm_token_type_ids, which the processor returns with input_ids.")
        base: Any = model.base_model
        positions: Tensor = base.get_rope_index(**inputs)[0]
        return positions
    family = family_of(model.config)
    first = family.first_position if family else 0
    valid = inputs.get("attention_mask")
    valid = torch.ones_like(inputs["input_ids"]) if valid is None else valid.long()
    return _by_axis(model, valid.cumsum(-1) - 1 + first)


def decode_positions(model: PreTrainedModel, next_positions: Tensor) -> Tensor:
    """Position ids of one new token of every sequence: ``[B, 1]`` or ``[3, B, 1]``, from next positions ``[B]``."""
    return _by_axis(model, next_positions[:, None])


def _has_multimodal_rope(model: PreTrainedModel) -> bool:
    return hasattr(model.base_model, "get_rope_index")


def _by_axis(model: PreTrainedModel, positions: Tensor) -> Tensor:
    """Position ids of text tokens from positions ``[B, T]``: the same on all three axes of multimodal RoPE."""
    return positions.expand(3, -1, -1) if _has_multimodal_rope(model) else positions
