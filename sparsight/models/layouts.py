"""From vision tokens back to the places of a picture that they stand for.

A layout is the order in which a family turns pixels into vision tokens. It takes the model's config and the processor's
outputs for one prompt, and gives back one :class:`Picture` for each picture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import isqrt, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Tile:
    """A rectangle of pixels that a model sees as a grid of vision tokens.

    Args:
        name: which picture it is, or which scale of which picture.
        pixels: float32 ``[H, W, 3]``.
        tokens: int64 ``[rows, columns]``, the vision token of each cell; all cells cover equally many pixels.
        seams: where separately encoded parts of the tile meet: rows of cells and columns of cells that begin one.
    """

    name: str
    pixels: Tensor
    tokens: Tensor
    seams: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@dataclass(frozen=True)
class Picture:
    """The tiles of one picture, whose ``tokens`` count from the picture's first, and how many tokens it has."""

    tiles: tuple[Tile, ...]
    token_count: int


Layout = Callable[[Any, Mapping[str, Any]], list[Picture]]


def find_tiles(layout: Layout, config: Any, inputs: Mapping[str, Any], image_processor: Any) -> list[Tile]:
    """The tiles of a prompt: pixels in ``[0, 1]`` as the model saw them, ``tokens`` as positions in the prompt.

    Args:
        layout: the family's.
        config: the model's config.
        inputs: what the processor returned for one prompt.
        image_processor: the processor of the pixels, whose normalisation is undone.

    Raises:
        ValueError: the prompt does not hold as many vision tokens as its pictures have.
    """
    positions = (inputs["input_ids"][0] == config.image_token_id).nonzero()[:, 0]
    pictures = layout(config, inputs)
    total = sum(picture.token_count for picture in pictures)
    if total != len(positions):
        raise ValueError(
            f"The pictures have {total} vision tokens by the layout of {config.model_type!r}, "
            f"but the prompt holds {len(positions)}."
        )
    first = accumulate((picture.token_count for picture in pictures), initial=0)
    return [
        replace(
            tile,
            name=f"Image {number}, {tile.name}".rstrip(", ") if len(pictures) > 1 else tile.name.capitalize(),
            pixels=_unnormalise(tile.pixels, image_processor),
            tokens=positions[offset + tile.tokens],
        )
        for number, (picture, offset) in enumerate(zip(pictures, first, strict=False), start=1)
        for tile in picture.tiles
    ]


def find_grids(layout: Layout, config: Any, inputs: Mapping[str, Any]) -> list[list[Tensor]]:
    """Which positions of each prompt of a batch lie beside and above each other in a picture.

    Args:
        layout: the family's.
        config: the model's config.
        inputs: what the processor returned for the batch.

    Returns:
        For each prompt the grids of its tiles, int64 ``[rows, columns]`` on the CPU. None where the layout does not
        apply: to videos, and to batches whose pixels are padded.
    """
    ids = inputs["input_ids"].cpu()
    batch, length = ids.shape
    grids: list[list[Tensor]] = [[] for _ in range(batch)]
    if inputs.get("pixel_values") is None:
        return grids
    together = {**inputs, "input_ids": ids.reshape(1, -1)}
    positions = (together["input_ids"][0] == config.image_token_id).nonzero()[:, 0]
    pictures = layout(config, together)
    if sum(picture.token_count for picture in pictures) != len(positions):
        return grids
    first = accumulate((picture.token_count for picture in pictures), initial=0)
    for picture, offset in zip(pictures, first, strict=False):
        for tile in picture.tiles:
            places = positions[offset + tile.tokens]
            grids[int(places[0, 0]) // length].append(places % length)
    return grids


def whole_grid(config: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """Every picture is one grid of patches, row by row, after tokens without a place such as CLS (Llava).

    Patches may be merged in squares, and pictures may differ in size (Mistral3).
    """
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    pixels = inputs["pixel_values"]
    # Where pictures differ in size (Pixtral's encoder) they are padded to the largest.
    sizes = inputs.get("image_sizes", torch.tensor([pixels.shape[-2:]] * len(pixels)))
    grids = [(int(height) // patch, int(width) // patch) for height, width in sizes]
    tokens = int((inputs["input_ids"][0] == config.image_token_id).sum())
    leading = (tokens - sum(rows * columns for rows, columns in grids)) // len(grids)
    return [
        Picture(
            (Tile("", _cut(image, rows * patch, columns * patch), _grid(rows, columns, leading)),),
            leading + rows * columns,
        )
        for image, (rows, columns) in zip(pixels, grids, strict=True)
    ]


def squares(config: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """Every picture is a square that is seen as a square grid of tokens, row by row (Gemma3)."""
    return [Picture((tile,), tile.tokens.numel()) for tile in _each_square(config, inputs)]


def square_tiles(config: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """Pictures are cut into square tiles, each a square grid of tokens, row by row (InternVL, Idefics3).

    Tiles come one after another, and not all families tell how many belong to a picture: each is shown on its own.
    """
    each = _each_square(config, inputs)
    count = each[0].tokens.numel()
    tiles = [
        replace(tile, name=f"tile {number}" if len(each) > 1 else "", tokens=tile.tokens + (number - 1) * count)
        for number, tile in enumerate(each, start=1)
    ]
    return [Picture(tuple(tiles), len(tiles) * count)]


def _each_square(config: Any, inputs: Mapping[str, Any]) -> list[Tile]:
    """All pixels ``[.., N, 3, H, W]`` as squares of equally many tokens."""
    pixels = inputs["pixel_values"]
    if pixels.ndim > 4:
        # Prompts with fewer squares than others of the batch are filled up with zeros (Idefics3), as the model knows.
        pixels = pixels.flatten(0, -4)
        pixels = pixels[pixels.flatten(1).any(1)]
    side = isqrt(int((inputs["input_ids"][0] == config.image_token_id).sum()) // len(pixels))
    # What is left over at the edges is in no patch.
    sides = [side * (length // max(side, 1)) for length in pixels.shape[-2:]]
    return [Tile("", _cut(image, *sides), _grid(side, side)) for image in pixels]


def base_and_tiles(config: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """A base tile of the whole picture, then a canvas of high-resolution tiles without its padding (LlavaNext).

    A token that stands for no place ends every row of the canvas. A canvas of too many tokens is scaled down
    (LlavaOnevision), and of several pictures there are base tiles only, with one such token each.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = config.vision_config.image_size
    patch = config.vision_config.patch_size
    count = side // patch
    pictures = []
    several = "batch_num_images" in inputs and int(inputs["batch_num_images"][0]) > 1
    for tiles, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
        if several:
            pictures.append(Picture((Tile("", _cut(tiles[0], side, side), _grid(count, count)),), count * count + 1))
            continue
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        canvas = tiles[1 : 1 + rows * columns].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        canvas = canvas.flatten(1, 2).flatten(2, 3)
        # Which cells the model keeps is transformers' own arithmetic, run on the cells' numbers.
        numbers = torch.arange(rows * count * columns * count).view(1, rows * count, -1)
        cells = unpad_image(numbers, size)[0]
        height, width = cells.shape
        base = Tile("base", _cut(tiles[0], side, side), _grid(count, count))
        if not cells.numel():
            # Of a picture much longer than wide nothing is left but the tokens that end rows.
            pictures.append(Picture((base,), count * count + height * (width + 1)))
            continue
        top, left = divmod(int(cells[0, 0]), columns * count)
        seen = _cut(canvas[:, top * patch :, left * patch :], height * patch, width * patch)
        seams = (_seams(rows, count, top, height), _seams(columns, count, left, width))
        ratio = sqrt(height * width / count**2 / _most_tiles(config))
        if ratio > 1.1:
            old_height, old_width = height, width
            height, width = int(height // ratio), int(width // ratio)
            seams = (_scaled(seams[0], height / old_height), _scaled(seams[1], width / old_width))
            seen = _resize(seen, height * patch, width * patch)
        high = Tile("high-res", seen, _grid(height, width, count * count, row_length=width + 1), seams)
        pictures.append(Picture((base, high), count * count + height * (width + 1)))
    return pictures


def _most_tiles(config: Any) -> float:
    """How many tiles' tokens a canvas may have before LlavaOnevision scales it down; others do not."""
    aspect = getattr(config, "vision_aspect_ratio", None)
    return int(aspect.removeprefix("anyres_max_")) if aspect else torch.inf


def merged_patches(config: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """Every picture is a grid of squares of merged patches, row by row; pixels come square by square (Qwen2.5-VL)."""
    patch = config.vision_config.patch_size
    merge = config.vision_config.spatial_merge_size
    grids = inputs["image_grid_thw"].tolist()
    pictures = []
    for pixels, (_, height, width) in zip(
        inputs["pixel_values"].split([frames * height * width for frames, height, width in grids]), grids, strict=True
    ):
        rows, columns = height // merge, width // merge
        # An image is one frame, repeated to fill the patches' extent in time.
        image = pixels.view(rows, columns, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
        image = image.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * patch, width * patch)
        pictures.append(Picture((Tile("", _cut(image, *image.shape[1:]), _grid(rows, columns)),), rows * columns))
    return pictures


def packed_slices(config: Any, inputs: Mapping[str, Any]) -> list[Picture]:
    """Pictures and slices of them are grids of merged patches, whose patches come side by side (MiniCPM-V)."""
    patch = config.vision_config.patch_size
    mode = inputs.get("downsample_mode") or config.downsample_mode
    # Patches are merged once inside the vision tower, and behind it.
    merge = config.merge_kernel_size[0] ** config.merger_times * (1 if mode == "4x" else 2)
    grids = inputs["target_sizes"].tolist()
    packed = inputs["pixel_values"][0].split([height * width * patch for height, width in grids], dim=-1)
    tiles, first = [], 0
    for number, (pixels, (height, width)) in enumerate(zip(packed, grids, strict=True), start=1):
        image = pixels.view(3, patch, height, width, patch).transpose(1, 2).reshape(3, height * patch, width * patch)
        tokens = _grid(height // merge, width // merge, first)
        tiles.append(Tile(f"slice {number}" if len(grids) > 1 else "", _cut(image, *image.shape[1:]), tokens))
        first += tokens.numel()
    return [Picture(tuple(tiles), first)]


def _cut(image: Tensor, height: int, width: int) -> Tensor:
    """The top left ``[height, width, 3]`` of an image ``[3, H, W]``."""
    return image[:, :height, :width].permute(1, 2, 0).float()


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """An image ``[H, W, 3]`` at another size."""
    resized = functional.interpolate(image.permute(2, 0, 1)[None], (height, width), mode="bilinear")
    return resized[0].permute(1, 2, 0)


def _grid(rows: int, columns: int, first: int = 0, row_length: int | None = None) -> Tensor:
    """Token numbers ``[rows, columns]`` from ``first`` on, row by row, of rows that are ``row_length`` tokens long."""
    return first + torch.arange(rows)[:, None] * (row_length or columns) + torch.arange(columns)


def _seams(tiles: int, cells: int, start: int, length: int) -> tuple[int, ...]:
    """Where tiles of ``cells`` cells begin, in a view of ``length`` cells from ``start`` on; not at its edges."""
    return tuple(place for place in (tile * cells - start for tile in range(1, tiles)) if 0 < place < length)


def _scaled(seams: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """The cells that seams are nearest to when there are ``factor`` as many cells."""
    return tuple(round(seam * factor) for seam in seams)


def _unnormalise(pixels: Tensor, image_processor: Any) -> Tensor:
    """Pixels ``[H, W, 3]`` as they were before the processor normalised them, in ``[0, 1]``."""
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    if not image_processor.do_rescale:
        pixels = pixels / 255
    return pixels.clamp(0, 1)
