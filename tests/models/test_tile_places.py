"""Tiles are placed where their pixels come from, by the colours of an image in which each colour has one place."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.models.families import FAMILIES
from sparsight.models.layouts import Tile, find_tiles
from sparsight.models.tile_places import place_tiles, visible_box
from tests.models.test_layouts import processed
from tests.support.processors import REAL

SIZES = [(28, 28), (56, 30), (30, 100), (100, 56), (224, 90)]


def gradient(width, height):
    """An image whose red grows from left to right, and whose green grows from top to bottom."""
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    pixels = np.stack([40 + 160 * across, 40 + 160 * down, np.full_like(across, 120)], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def placed(family, *sizes):
    """The tiles of gradients of some sizes, and what was placed."""
    inputs, made, config = processed(family, *(gradient(*size) for size in sizes))
    found = find_tiles(FAMILIES[family].layout, config, inputs, made.image_processor)
    return place_tiles(found, FAMILIES[family].cut, made.image_processor, sizes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", REAL)
def test_each_cell_shows_the_part_of_the_image_where_it_is_placed(family, size):
    cells = 0
    for tile in placed(family, size):
        left, top, right, bottom = tile.box
        rows, columns = tile.tokens.shape
        pixels = torch.nn.functional.adaptive_avg_pool2d(tile.pixels.permute(2, 0, 1) * 255, (rows, columns))
        x = left + (right - left) * (torch.arange(columns) + 0.5) / columns
        y = top + (bottom - top) * (torch.arange(rows) + 0.5) / rows
        shown = (pixels[:2] - 40) / 160
        # A cell at an edge may show a margin.
        inside = (pixels[2] - 120).abs() < 4
        assert ((shown[0] - x).abs()[inside] < 0.05).all()
        assert ((shown[1] - y[:, None]).abs()[inside] < 0.05).all()
        cells += int(inside.sum())
    assert cells


CUTTING = ["internvl", "idefics3", "ovis2", "aya_vision", "minicpmv4_6"]


@pytest.mark.parametrize("family", CUTTING)
def test_tiles_of_several_images_belong_to_their_own(family):
    sizes = (224, 90), (28, 28), (60, 200)
    alone = [placed(family, size) for size in sizes]
    assert len(alone[0]) > 1 and len(alone[2]) > 1
    together = placed(family, *sizes)
    expected = [(image, tile.box) for image, tiles in enumerate(alone) for tile in tiles]
    assert [(tile.image, tile.box) for tile in together] == expected


def test_tiles_have_no_place_where_it_is_not_known_how_images_were_cut():
    inputs, made, config = processed("internvl", gradient(224, 90))
    tiles = find_tiles(FAMILIES["internvl"].layout, config, inputs)
    other = copy.copy(made.image_processor)
    other.max_patches = 1
    for cut, processor in ((None, made.image_processor), (FAMILIES["internvl"].cut, other)):
        assert [tile.box for tile in place_tiles(tiles, cut, processor, [(224, 90)])] == [None] * len(tiles)
    # Parts of an image that count as images of their own.
    two = [Tile("", torch.ones(2, 2, 3), torch.zeros(1, 1), image=image) for image in range(2)]
    assert [tile.box for tile in place_tiles(two, None, made.image_processor, [(28, 28)])] == [None, None]


def test_what_is_cropped_is_not_in_the_box():
    processor = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 14})
    assert visible_box(processor, 112, 56) == (0.375, 0.0, 0.625, 1.0)
    processor.size = {"height": 56, "width": 28}
    assert visible_box(processor, 5, 9) == (0.25, 0.25, 0.75, 0.75)
