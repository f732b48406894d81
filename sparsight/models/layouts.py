"""Layouts: which pixels of an image each vision token stands for.

A layout is the order in which a model family turns pixels into vision tokens: a function that takes the model's config
and the processor's outputs for one prompt, and returns one :class:`ImageTiles` per image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import isqrt, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as fractions of an image's sides."""

FULL_IMAGE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Tile:
    """A rectangle of pixels that a model encodes as one grid of vision tokens.

    Args:
        name: the image, or the scale of the image, that the tile shows.
        pixels: float32 ``[H, W, 3]``.
        tokens: int64 ``[rows, columns]``, the vision token of each cell. All cells cover the same number of pixels.
        seams: the rows and the columns of cells at which a separately encoded part of the tile begins.
        image: which of the prompt's images it belongs to.
        box: where it lies in the image as the processor got it; beyond its sides where it covers padding. None where
            the processor's outputs do not say it: see :mod:`sparsight.models.tile_places`.
    """

    name: str
    pixels: Tensor
    tokens: Tensor
    seams: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    image: int = 0
    box: Box | None = FULL_IMAGE


@dataclass(frozen=True)
class ImageTiles:
    """The tiles of one image, with ``tokens`` counted from the image's first one, and its number of vision tokens."""

    tiles: tuple[Tile, ...]
    token_count: int


Layout = Callable[[Any, Mapping[str, Any]], list[ImageTiles]]


def find_tiles(layout: Layout, config: Any, inputs: Mapping[str, Any], image_processor: Any = None) -> list[Tile]:
    """The tiles of a prompt's images, with ``tokens`` as positions in the prompt.

    Args:
        layout: the family's layout.
        config: the model's config.
        inputs: the processor's outputs for one prompt.
        image_processor: the image processor, whose normalisation is undone: pixels are in ``[0, 1]``. Without it they
            are what the model gets.

    Raises:
        ValueError: the prompt does not hold as many vision tokens as its images have by the layout.
    """
    positions = (inputs["input_ids"][0] == config.image_token_id).nonzero()[:, 0]
    images = layout(config, inputs)
    total = sum(image.token_count for image in images)
    if total != len(positions):
        raise ValueError(
            f"The images have {total} vision tokens by the layout of {config.model_type!r}, "
            f"but the prompt holds {len(positions)}."
        )
    first = accumulate((image.token_count for image in images), initial=0)
    return [
        replace(
            tile,
            name=f"Image {number}, {tile.name}".rstrip(", ") if len(images) > 1 else tile.name.capitalize(),
            pixels=_unnormalise(tile.pixels, image_processor) if image_processor else tile.pixels,
            tokens=positions[offset + tile.tokens],
            image=number - 1,
        )
        for number, (image, offset) in enumerate(zip(images, first, strict=False), start=1)
        for tile in image.tiles
    ]


def find_grids(layout: Layout, config: Any, inputs: Mapping[str, Any]) -> list[list[Tensor]]:
    """The patch grids of each prompt of a batch: which positions are neighbours in an image.

    Args:
        layout: the family's layout.
        config: the model's config.
        inputs: the processor's outputs for the batch.

    Returns:
        For each prompt the positions of its tiles' vision tokens, int64 ``[rows, columns]`` on the CPU. The list is
        empty where the layout does not apply: for videos, and for batches with padded pixels.
    """
    ids = inputs["input_ids"].cpu()
    batch, length = ids.shape
    grids: list[list[Tensor]] = [[] for _ in range(batch)]
    if inputs.get("pixel_values") is None:
        return grids
    flat = {**inputs, "input_ids": ids.reshape(1, -1)}
    positions = (flat["input_ids"][0] == config.image_token_id).nonzero()[:, 0]
    images = layout(config, flat)
    if sum(image.token_count for image in images) != len(positions):
        return grids
    first = accumulate((image.token_count for image in images), initial=0)
    for image, offset in zip(images, first, strict=False):
        for tile in image.tiles:
            grid = positions[offset + tile.tokens]
            grids[int(grid[0, 0]) // length].append(grid % length)
    return grids


def single_grid(config: Any, inputs: Mapping[str, Any]) -> list[ImageTiles]:
    """Each image is one grid of patches in row-major order, after tokens that stand for no patch, such as CLS (Llava).

    Patches may be merged in squares, and images may differ in size (Mistral3).
    """
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    pixels = inputs["pixel_values"]
    # Images of different sizes are padded to the largest (Pixtral's encoder).
    sizes = inputs.get("image_sizes", torch.tensor([pixels.shape[-2:]] * len(pixels)))
    grids = [(int(height) // patch, int(width) // patch) for height, width in sizes]
    tokens = int((inputs["input_ids"][0] == config.image_token_id).sum())
    leading = (tokens - sum(rows * columns for rows, columns in grids)) // len(grids)
    return [
        ImageTiles(
            (Tile("", _cut(image, rows * patch, columns * patch), _grid(rows, columns, leading)),),
            leading + rows * columns,
        )
        for image, (rows, columns) in zip(pixels, grids, strict=True)
    ]


def square_grid(config: Any, inputs: Mapping[str, Any]) -> list[ImageTiles]:
    """Each image is resized to a square and encoded as a square grid of tokens in row-major order (Gemma3)."""
    return [ImageTiles((tile,), tile.tokens.numel()) for tile in _each_square(config, inputs)]


def square_tiles(config: Any, inputs: Mapping[str, Any]) -> list[ImageTiles]:
    """Images are cut into square tiles, each a square grid of tokens in row-major order (InternVL, Idefics3).

    Not all families' inputs say how many tiles an image has: each tile is shown separately.
    """
    each = _each_square(config, inputs)
    count = each[0].tokens.numel()
    tiles = [
        replace(tile, name=f"tile {number}", tokens=tile.tokens + (number - 1) * count, box=None)
        for number, tile in enumerate(each, start=1)
    ]
    tiles = tiles if len(each) > 1 else each
    return [ImageTiles(tuple(tiles), len(tiles) * count)]


def _each_square(config: Any, inputs: Mapping[str, Any]) -> list[Tile]:
    """All pixels ``[.., N, 3, H, W]`` as square tiles with the same number of tokens."""
    pixels = inputs["pixel_values"]
    if pixels.ndim > 4:
        # Prompts with fewer tiles than others of the batch are padded with zeros, which the model skips (Idefics3).
        pixels = pixels.flatten(0, -4)
        pixels = pixels[pixels.flatten(1).any(1)]
    side = isqrt(int((inputs["input_ids"][0] == config.image_token_id).sum()) // len(pixels))
    # Pixels left over at the edges belong to no patch.
    sides = [side * (length // max(side, 1)) for length in pixels.shape[-2:]]
    return [Tile("", _cut(image, *sides), _grid(side, side)) for image in pixels]


def base_and_tiles(config: Any, inputs: Mapping[str, Any]) -> list[ImageTiles]:
    """A base tile of the full image, then a canvas of high-resolution tiles without its padding (LlavaNext).

    Each row of the canvas ends with a newline token that stands for no patch. A canvas with too many tokens is scaled
    down; several images in one prompt have base tiles only, with one newline token each (LlavaOnevision).
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = config.vision_config.image_size
    patch = config.vision_config.patch_size
    count = side // patch
    images = []
    several = "batch_num_images" in inputs and int(inputs["batch_num_images"][0]) > 1
    for tiles, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
        if several:
            images.append(ImageTiles((Tile("", _cut(tiles[0], side, side), _grid(count, count)),), count * count + 1))
            continue
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        canvas = tiles[1 : 1 + rows * columns].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        canvas = canvas.flatten(1, 2).flatten(2, 3)
        # transformers' own cropping, applied to the cells' numbers, gives the cells that the model keeps.
        numbers = torch.arange(rows * count * columns * count).view(1, rows * count, -1)
        cells = unpad_image(numbers, size)[0]
        height, width = cells.shape
        base = Tile("base", _cut(tiles[0], side, side), _grid(count, count))
        if not cells.numel():
            # For an image much longer than wide only the newline tokens are left.
            images.append(ImageTiles((base,), count * count + height * (width + 1)))
            continue
        top, left = divmod(int(cells[0, 0]), columns * count)
        box = _box_on_canvas((top, left, height, width), (rows, columns), count, size)
        pixels = _cut(canvas[:, top * patch :, left * patch :], height * patch, width * patch)
        seams = (_seams(rows, count, top, height), _seams(columns, count, left, width))
        ratio = sqrt(height * width / count**2 / _most_tiles(config))
        if ratio > 1.1:
            old_height, old_width = height, width
            height, width = int(height // ratio), int(width // ratio)
            seams = (_scaled(seams[0], height / old_height), _scaled(seams[1], width / old_width))
            pixels = _resize(pixels, height * patch, width * patch)
        high = Tile("high-res", pixels, _grid(height, width, count * count, row_length=width + 1), seams, box=box)
        images.append(ImageTiles((base, high), count * count + height * (width + 1)))
    return images


def _box_on_canvas(cells: tuple[int, ...], tiles: tuple[int, int], count: int, size: list[int]) -> Box:
    """Where cells ``(top, left, height, width)`` of a canvas lie in an image ``[height, width]`` on it.

    The canvas has so many ``tiles`` in height and width, of ``count`` x ``count`` cells, and the image is as large as
    fits, in its middle.
    """
    height, width = (each * count for each in tiles)
    scale = min(height / size[0], width / size[1])
    tall, wide = size[0] * scale, size[1] * scale
    top, left = cells[0] - (height - tall) / 2, cells[1] - (width - wide) / 2
    return left / wide, top / tall, (left + cells[3]) / wide, (top + cells[2]) / tall


def _most_tiles(config: Any) -> float:
    """Tiles whose tokens a canvas may have before it is scaled down (LlavaOnevision); no limit for other families."""
    aspect = getattr(config, "vision_aspect_ratio", None)
    return int(aspect.removeprefix("anyres_max_")) if aspect else torch.inf


def merged_patches(config: Any, inputs: Mapping[str, Any]) -> list[ImageTiles]:
    """Each image is a row-major grid of merged squares of patches; pixels are stored square by square (Qwen2.5-VL)."""
    patch = config.vision_config.patch_size
    merge = config.vision_config.spatial_merge_size
    grids = inputs["image_grid_thw"].tolist()
    images = []
    for pixels, (_, height, width) in zip(
        inputs["pixel_values"].split([frames * height * width for frames, height, width in grids]), grids, strict=True
    ):
        rows, columns = height // merge, width // merge
        # An image is one frame, repeated to fill the patch's extent in time.
        image = pixels.view(rows, columns, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
        image = image.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * patch, width * patch)
        images.append(ImageTiles((Tile("", _cut(image, *image.shape[1:]), _grid(rows, columns)),), rows * columns))
    return images


def packed_slices(config: Any, inputs: Mapping[str, Any]) -> list[ImageTiles]:
    """Images and slices of them are grids of merged patches, with all patches packed side by side (MiniCPM-V)."""
    patch = config.vision_config.patch_size
    mode = inputs.get("downsample_mode") or config.downsample_mode
    # Patches are merged inside the vision tower and after it.
    merge = config.merge_kernel_size[0] ** config.merger_times * (1 if mode == "4x" else 2)
    grids = inputs["target_sizes"].tolist()
    packed = inputs["pixel_values"][0].split([height * width * patch for height, width in grids], dim=-1)
    tiles, first = [], 0
    for number, (pixels, (height, width)) in enumerate(zip(packed, grids, strict=True), start=1):
        image = pixels.view(3, patch, height, width, patch).transpose(1, 2).reshape(3, height * patch, width * patch)
        tokens = _grid(height // merge, width // merge, first)
        name, box = (f"slice {number}", None) if len(grids) > 1 else ("", FULL_IMAGE)
        tiles.append(Tile(name, _cut(image, *image.shape[1:]), tokens, box=box))
        first += tokens.numel()
    return [ImageTiles(tuple(tiles), first)]


def _cut(image: Tensor, height: int, width: int) -> Tensor:
    """The top left ``[height, width, 3]`` of an image ``[3, H, W]``."""
    return image[:, :height, :width].permute(1, 2, 0).float()


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """An image ``[H, W, 3]`` at another size."""
    resized = functional.interpolate(image.permute(2, 0, 1)[None], (height, width), mode="bilinear")
    return resized[0].permute(1, 2, 0)


def _grid(rows: int, columns: int, first: int = 0, row_length: int | None = None) -> Tensor:
    """Token numbers ``[rows, columns]`` in row-major order from ``first``, with ``row_length`` tokens per row."""
    return first + torch.arange(rows)[:, None] * (row_length or columns) + torch.arange(columns)


def _seams(tiles: int, cells: int, start: int, length: int) -> tuple[int, ...]:
    """Inner borders between tiles of ``cells`` cells, within a view of ``length`` cells that begins at ``start``."""
    return tuple(seam for seam in (tile * cells - start for tile in range(1, tiles)) if 0 < seam < length)


def _scaled(seams: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """Seams after the grid is resized by ``factor``, rounded to the nearest cell."""
    return tuple(round(seam * factor) for seam in seams)


def _unnormalise(pixels: Tensor, image_processor: Any) -> Tensor:
    """Undo the processor's normalisation of pixels ``[H, W, 3]``; the result is in ``[0, 1]``."""
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    if not image_processor.do_rescale:
        pixels = pixels / 255
    return pixels.clamp(0, 1)
