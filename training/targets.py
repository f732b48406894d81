"""What a patch of a picture says, as a vector: the language the eyes are taught to speak and the decoder to read.

A patch's vector is a sum of directions that are orthogonal to each other: one that every patch has, two for where it
stands, one for each character in each third of the patch, one for each shape and colour whose centre is near, and one
for each that lies over the patch. The borders between thirds and patches are ramps about a pixel wide, since no eye can
tell on which side of a border a character stands exactly.
"""

import numpy as np
import torch

from sparsight.zoo.page import GLYPHS, PATCH, WIDTH, Page
from sparsight.zoo.scene import COLORS, SHAPES, Scene

GRID = WIDTH // PATCH
SLOTS = 3
BASE, WHERE_X, WHERE_Y = 0, 1, 2
FIRST_GLYPH = 3
FIRST_SHAPE = FIRST_GLYPH + SLOTS * len(GLYPHS)
FIRST_COLOR = FIRST_SHAPE + len(SHAPES)
FIRST_COVER = FIRST_COLOR + len(COLORS)
FEATURES = FIRST_COVER + len(SHAPES) + len(COLORS)
RAMP_X, RAMP_Y = 0.2, 0.07
POSITION_WEIGHT = 0.5
COVER_WEIGHT = 0.7
THING_WEIGHT = 2.5
"""A thing is shared out over four patches; each share must still stand out."""
BASIS_SEED = 20261120


def basis(width: int) -> torch.Tensor:
    """The directions, `[FEATURES, width]`, orthonormal."""
    generator = torch.Generator().manual_seed(BASIS_SEED)
    square = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return square[:FEATURES].contiguous()


def glyph_feature(char: str, slot: int) -> int:
    """Index of a character in a third of a patch."""
    return FIRST_GLYPH + slot * len(GLYPHS) + GLYPHS.index(char)


def split_weight(position: float, ramp: float) -> list[tuple[int, float]]:
    """The cell that `position` falls into, or two with weights that sum to one within `ramp` of a border."""
    cell = int(np.floor(position))
    inside = position - cell
    if inside < ramp:
        low = 0.5 - 0.5 * inside / ramp
        return [(cell, 1 - low), (cell - 1, low)]
    if inside > 1 - ramp:
        high = 0.5 - 0.5 * (1 - inside) / ramp
        return [(cell, 1 - high), (cell + 1, high)]
    return [(cell, 1.0)]


def page_features(page: Page) -> np.ndarray:
    """What each patch of a page shows, `[rows * 24, FEATURES]`, rows from the top."""
    rows = page.height // PATCH
    table = blank(rows)
    for char, x, y in page.centres():
        index = GLYPHS.index(char)
        for row, high in split_weight(y / PATCH, RAMP_Y):
            for slot, wide in split_weight(x * SLOTS / PATCH, RAMP_X):
                if 0 <= row < rows and 0 <= slot < SLOTS * GRID:
                    column, third = divmod(slot, SLOTS)
                    table[row, column, FIRST_GLYPH + third * len(GLYPHS) + index] += high * wide
    return table.reshape(rows * GRID, FEATURES)


def scene_features(scene: Scene) -> np.ndarray:
    """What each patch of a scene shows, `[rows * 24, FEATURES]`: a thing's centre is shared out over four patches."""
    rows = scene.height // PATCH
    table = blank(rows)
    middles_y, middles_x = PATCH * (np.mgrid[:rows, :GRID] + 0.5)
    for thing in scene.things:
        covered = np.hypot(middles_x - thing.x, middles_y - thing.y) < 0.8 * thing.radius
        table[covered, FIRST_COVER + SHAPES.index(thing.shape)] = COVER_WEIGHT
        table[covered, FIRST_COVER + len(SHAPES) + list(COLORS).index(thing.color)] = COVER_WEIGHT
        u, v = thing.x / PATCH - 0.5, thing.y / PATCH - 0.5
        left, top = int(np.floor(u)), int(np.floor(v))
        for row, high in ((top, 1 - v + top), (top + 1, v - top)):
            for column, wide in ((left, 1 - u + left), (left + 1, u - left)):
                amount = THING_WEIGHT * high * wide
                if 0 <= row < rows and 0 <= column < GRID:
                    table[row, column, FIRST_SHAPE + SHAPES.index(thing.shape)] += amount
                    table[row, column, FIRST_COLOR + list(COLORS).index(thing.color)] += amount
    return table.reshape(rows * GRID, FEATURES)


def features(image: Page | Scene) -> np.ndarray:
    """What each patch of an image shows, `[rows * 24, FEATURES]`."""
    return page_features(image) if isinstance(image, Page) else scene_features(image)


def blank(rows: int) -> np.ndarray:
    """Patches that show nothing but where they stand, `[rows, 24, FEATURES]`."""
    table = np.zeros((rows, GRID, FEATURES), dtype=np.float32)
    table[:, :, BASE] = 1
    table[:, :, WHERE_X] = POSITION_WEIGHT * np.linspace(-1, 1, GRID)
    table[:, :, WHERE_Y] = POSITION_WEIGHT * np.linspace(-1, 1, GRID)[:rows, None]
    return table
