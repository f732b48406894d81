"""Where tiles lie in an image as it was sent: what a processor's outputs do not say, from its public functions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from sparsight.models.layouts import FULL_IMAGE, Box, Tile

Sizes = Sequence[tuple[int, int]]
"""Width and height of each image of a prompt."""


class Cut(NamedTuple):
    """How an image processor cuts an image into tiles, row by row, beside one of the full image.

    Attributes:
        grid: rows and columns for an image processor, a width and a height; at most one tile if the image is not cut.
        full_first: whether the tile of the full image comes before the others, not after them.
    """

    grid: Callable[[Any, int, int], tuple[int, int]]
    full_first: bool = False


def place_tiles(tiles: Sequence[Tile], cut: Cut | None, image_processor: Any, sizes: Sizes) -> list[Tile]:
    """The tiles of a prompt with their places in its images.

    Args:
        tiles: as :func:`sparsight.models.layouts.find_tiles` returns them.
        cut: the family's.
        image_processor: the image processor, with the settings that it had.
        sizes: of the images as the processor got them.

    Returns:
        The tiles. Their ``box`` is None where it is not known how the images were cut.
    """
    if all(tile.box is not None and tile.image < len(sizes) for tile in tiles):
        return [_cropped(tile, image_processor, sizes[tile.image]) for tile in tiles]
    if len(tiles) == len(sizes):
        grids = [(1, 1)] * len(sizes)
    elif cut is not None:
        grids = [cut.grid(image_processor, *size) for size in sizes]
    else:
        return [replace(tile, box=None) for tile in tiles]
    found = [
        (image, box)
        for image, grid in enumerate(grids)
        for box in _boxes(*grid, full_first=cut is not None and cut.full_first)
    ]
    if len(found) != len(tiles):
        return [replace(tile, box=None) for tile in tiles]
    return [replace(tile, image=image, box=box) for tile, (image, box) in zip(tiles, found, strict=True)]


def _boxes(rows: int, columns: int, *, full_first: bool) -> list[Box]:
    """The places of an image's tiles, in their order."""
    if rows * columns <= 1:
        return [FULL_IMAGE]
    parts = [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row, column in product(range(rows), range(columns))
    ]
    return [FULL_IMAGE, *parts] if full_first else [*parts, FULL_IMAGE]


def _cropped(tile: Tile, image_processor: Any, size: tuple[int, int]) -> Tile:
    """The tile, without what the image processor cuts off at the sides of a full image."""
    # Processors of several tiles scale an image to a square, of which nothing is cut off.
    squares = hasattr(image_processor, "image_grid_pinpoints")
    return tile if squares or tile.box != FULL_IMAGE else replace(tile, box=visible_box(image_processor, *size))


def visible_box(image_processor: Any, width: int, height: int) -> Box:
    """The part of an image that is left of it once the image processor has resized and cropped it."""
    if not getattr(image_processor, "do_center_crop", False):
        return FULL_IMAGE
    size, crop = image_processor.size, image_processor.crop_size
    if size.get("shortest_edge"):
        scale = size["shortest_edge"] / min(width, height)
        width, height = round(width * scale), round(height * scale)
    else:
        width, height = size["width"], size["height"]
    across, down = min(1.0, crop["width"] / width), min(1.0, crop["height"] / height)
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _closest_ratio(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    side = image_processor.size["height"], image_processor.size["width"]
    limits = image_processor.min_patches, image_processor.max_patches
    columns, rows = get_optimal_tiled_canvas((height, width), side, *limits)
    return rows, columns


def _covering(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    from transformers.models.ovis2.image_processing_pil_ovis2 import get_min_tile_covering_grid

    if not image_processor.use_covering_area_grid:
        return _closest_ratio(image_processor, width, height)
    side, most = image_processor.size["height"], image_processor.max_patches
    columns, rows = get_min_tile_covering_grid((height, width), side, most)
    return rows, columns


def _longest_edge(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    _, rows, columns = image_processor.get_number_of_image_patches(height, width)
    return rows, columns


def _slices(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    limits = image_processor.max_slice_nums, image_processor.scale_resolution
    rows, columns = image_processor.get_sliced_grid((height, width), *limits) or (1, 1)
    return rows, columns


CLOSEST_RATIO = Cut(_closest_ratio)
"""InternVL, Aya Vision."""
LONGEST_EDGE = Cut(_longest_edge)
"""Idefics3, SmolVLM."""
COVERING = Cut(_covering, full_first=True)
"""Ovis2."""
SLICES = Cut(_slices, full_first=True)
"""MiniCPM-V."""
