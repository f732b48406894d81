"""Locating the vision tokens, the padding and the post-vision queries of a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsight.models.families import CROSS_ATTENTION, FAMILIES, family_of
from sparsight.models.frames import as_videos, find_frames
from sparsight.models.layouts import find_grids

LAST_WINDOW = 32
"""Number of last queries used in place of post-vision queries when no text follows the last image."""

PIXEL_INPUTS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Span:
    """One sequence of a batch: valid tokens ``[start, stop)`` and post-vision queries ``[post_vision, stop)``."""

    start: int
    post_vision: int
    stop: int

    @property
    def length(self) -> int:
        """Number of valid tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Args:
        vision_mask: bool ``[B, T]`` on the CPU, true for tokens that stand for part of an image or a video frame.
        valid_mask: bool ``[B, T]`` on the CPU, true for tokens that are not padding.
        spans: one :class:`Span` per sequence.
        grids: for each sequence the patch grids of its images: the positions of the vision tokens of each tile, int64
            ``[rows, columns]`` on the CPU. Empty where the layout is not known.
        frames: for each sequence its videos, and images of one size in a row: positions of the vision tokens of each
            frame, int64 ``[F, patches]`` on the CPU.
    """

    vision_mask: Tensor
    valid_mask: Tensor
    spans: tuple[Span, ...]
    grids: tuple[tuple[Tensor, ...], ...]
    frames: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens of each sequence, padding included: ``T``."""
        return self.vision_mask.shape[1]

    @cached_property
    def vision_tokens(self) -> list[int]:
        """Number of vision tokens of each sequence."""
        return self.vision_mask.sum(-1).tolist()

    def select(self, sequences: Sequence[int]) -> "Prompt":
        """The sequences with these indices, in that order."""
        chosen = list(sequences)
        spans = tuple(self.spans[index] for index in chosen)
        grids = tuple(self.grids[index] for index in chosen)
        frames = tuple(self.frames[index] for index in chosen if self.frames)
        return Prompt(self.vision_mask[chosen], self.valid_mask[chosen], spans, grids, frames)

    def continued(self, valid: Tensor, turn: "Prompt") -> tuple["Prompt", Tensor]:
        """The prompts with what followed them, as prompts of one piece: all padding comes first.

        Args:
            valid: bool ``[B, n]`` on the CPU, which tokens after the prompts, the turn's included, are valid.
            turn: what the last of them are.

        Returns:
            The longer prompts, and the column that each of theirs was before, int64 ``[B, T + n]``.
        """
        valid = torch.cat([self.valid_mask, valid], dim=1)
        order = valid.int().argsort(dim=1, stable=True)
        place, first = order.argsort(dim=1), valid.shape[1] - turn.length
        vision = torch.zeros_like(valid)
        vision[:, : self.length], vision[:, first:] = self.vision_mask, turn.vision_mask
        vision, valid = vision.gather(1, order), valid.gather(1, order)
        grids, frames = [], []
        for sequence, own in enumerate(place):
            shifted = [own[grid + first] for grid in turn.grids[sequence]]
            grids.append((*(own[grid] for grid in self.grids[sequence]), *shifted))
            if self.frames:
                videos = [*self.frames[sequence], *(video + first for video in turn.frames[sequence])]
                frames.append(as_videos(own[frame] for video in videos for frame in video))
        spans = tuple(_span(*masks) for masks in zip(vision, valid, strict=True))
        return Prompt(vision, valid, spans, tuple(grids), tuple(frames)), order


def locate(config: Any, inputs: Mapping[str, Any], *, grids: bool = False, frames: bool = False) -> Prompt:
    """Find the vision tokens, the padding and the post-vision queries of a batch of prompts.

    Args:
        config: the model's config.
        inputs: the processor's outputs: ``input_ids`` ``[B, T]``, and optionally ``attention_mask`` and
            ``mm_token_type_ids`` of the same shape.
        grids: find the images' patch grids too, for which the inputs must hold the pixels.
        frames: find the frames too.

    Raises:
        ValueError: the inputs lack ``input_ids``, have masks of another shape, pixels but no image token, a sequence
            without a valid token, or padding between valid tokens; or the family cannot be compressed, or is unknown
            and the inputs do not mark its vision tokens.
    """
    input_ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError("inputs must hold 'input_ids' of shape [batch, tokens], as the processor returns them.")
    for name in ("attention_mask", "mm_token_type_ids"):
        mask = inputs.get(name)
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name!r} must have the shape of 'input_ids', {list(input_ids.shape)}, got {list(mask.shape)}."
            )
    vision_mask = _vision_mask(config, inputs).cpu()
    if any(inputs.get(name) is not None for name in PIXEL_INPUTS) and not vision_mask.any():
        raise ValueError("The inputs hold an image, but the prompt has no image token to stand for it.")
    attention_mask = inputs.get("attention_mask")
    valid_mask = torch.ones_like(vision_mask) if attention_mask is None else attention_mask.bool().cpu()
    spans = tuple(_span(*masks) for masks in zip(vision_mask, valid_mask, strict=True))
    own_grids = _grids(config, inputs) if grids else ((),) * len(spans)
    return Prompt(vision_mask, valid_mask, spans, own_grids, find_frames(config, inputs, vision_mask) if frames else ())


def _grids(config: Any, inputs: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], ...]:
    """The patch grids of each sequence's images, empty for an unknown family."""
    family = FAMILIES.get(config.model_type)
    grids = find_grids(family.layout, config, inputs) if family else [[] for _ in inputs["input_ids"]]
    return tuple(map(tuple, grids))


def _vision_mask(config: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Bool ``[B, T]``, from the processor's token types if it returns them, else from the family's token ids."""
    token_types = inputs.get("mm_token_type_ids")
    if token_types is not None and config.model_type not in CROSS_ATTENTION:
        return token_types != 0
    input_ids, family = inputs["input_ids"], family_of(config)
    return torch.isin(input_ids, input_ids.new_tensor(family.token_ids(config) if family else []))


def _span(vision: Tensor, valid: Tensor) -> Span:
    """The span of one sequence from its masks ``[T]``."""
    if not valid.any():
        raise ValueError("A sequence of the batch has no valid token: its attention_mask is all zeros.")
    positions = valid.nonzero()[:, 0]
    start, stop = int(positions[0]), int(positions[-1]) + 1
    if stop - start != len(positions):
        raise ValueError("A sequence of the batch has padding between valid tokens: pad on one side only.")
    vision_positions = (vision & valid).nonzero()[:, 0]
    post_vision = int(vision_positions[-1]) + 1 if len(vision_positions) else stop
    if post_vision == stop:
        post_vision = max(start, stop - LAST_WINDOW)
    return Span(start, post_vision, stop)
