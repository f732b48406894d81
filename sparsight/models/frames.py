"""Frames: which vision tokens of a prompt stand for the same place at different times."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor


def find_frames(config: Any, inputs: Mapping[str, Any], vision: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """The frames of each prompt of a batch.

    Vision tokens in a row are one frame, or all frames of a video whose family puts nothing between them. Frames of
    the same number of tokens that follow each other, whatever text is between them, are one video; so are images, and
    the tiles of an image where its family puts text between them.

    Args:
        config: the model's config.
        inputs: the processor's outputs.
        vision: bool ``[B, T]`` on the CPU.

    Returns:
        For each sequence the positions of vision tokens, int64 ``[F, patches]`` for each of its videos.
    """
    videos = list(_videos(config, inputs))
    token = getattr(config, "video_token_id", None)
    seen = 0
    found = []
    for ids, mask in zip(inputs["input_ids"].cpu(), vision, strict=True):
        frames: list[Tensor] = []
        for run in vision_runs(mask):
            number, size = 1, len(run)
            if videos and int(ids[run[0]]) == token:
                if len(run) >= videos[0][0] * videos[0][1]:
                    number, size = videos[0]
                # Otherwise there is text between the video's frames, and this is one of them.
                seen += number
                if seen == videos[0][0]:
                    del videos[0]
                    seen = 0
            # What a family puts at the end of a video belongs to no frame.
            frames += run[: number * size].view(number, size)
        found.append(as_videos(frames))
    return tuple(found)


def as_videos(frames: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Positions ``[F, patches]`` of each video, from those ``[patches]`` of each frame."""
    return tuple(torch.stack(list(group)) for _, group in groupby(frames, key=len))


def _videos(config: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Frames of each video of a batch, and vision tokens of each of its frames."""
    grids, pixels = inputs.get("video_grid_thw"), inputs.get("pixel_values_videos")
    if grids is not None:
        merged = config.vision_config.spatial_merge_size**2
        yield from ((frames, height * width // merged) for frames, height, width in grids.tolist())
    elif pixels is not None and pixels.ndim == 5:
        total = int((inputs["input_ids"] == config.video_token_id).sum())
        yield from [(pixels.shape[1], total // (len(pixels) * pixels.shape[1]))] * len(pixels)


def vision_runs(mask: Tensor) -> Iterator[Tensor]:
    """Positions of the true elements of a mask ``[T]`` that follow each other."""
    positions = mask.nonzero()[:, 0]
    breaks = [index for index, (one, next_one) in enumerate(pairwise(positions.tolist()), 1) if next_one != one + 1]
    for start, stop in pairwise([0, *breaks, len(positions)]):
        if stop > start:
            yield positions[start:stop]
