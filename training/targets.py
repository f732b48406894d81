"""Target vectors of patches: what the vision tower is trained to output, and the decoder to read.

A patch's vector is a sum of orthogonal directions: a constant one, two for the patch's position, one for each character
in each third of the patch, and one each for the shape and the colour of a thing with its centre in the patch. Across
the borders between thirds and patches, weights change linearly over about a pixel, because the exact side of a
character cannot be read from the pixels.
"""

import numpy as np
import torch

from sparsight.reader.page import GLYPHS, PATCH, WIDTH, Page
from sparsight.reader.scene import COLORS, SHAPES, Scene

GRID = WIDTH // PATCH
SLOTS = 3
BASE, WHERE_X, WHERE_Y = 0, 1, 2
FIRST_GLYPH = 3
FIRST_SHAPE = FIRST_GLYPH + SLOTS * len(GLYPHS)
FIRST_COLOR = FIRST_SHAPE + len(SHAPES)
FEATURES = FIRST_COLOR + len(COLORS)
RAMP_X, RAMP_Y = 0.2, 0.07
THING_WEIGHT = 2.0
"""Weight of things, of which an image has few."""
BASIS_SEED = 20261120


def basis(width: int) -> torch.Tensor:
    """The directions, `[FEATURES, width]`, orthonormal."""
    generator = torch.Generator().manual_seed(BASIS_SEED)
    square = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return square[:FEATURES].contiguous()


def glyph_feature(char: str, slot: int) -> int:
    """Index of a character in a third of a patch."""
    return FIRST_GLYPH + slot * len(GLYPHS) + GLYPHS.index(char)


def token_meaning(directions: torch.Tensor, char: str) -> torch.Tensor:
    """The mean direction of the patches that show a character, of length one."""
    return torch.stack([directions[glyph_feature(char, slot)] for slot in range(SLOTS)]).sum(0) * SLOTS**-0.5


def split_weight(position: float, ramp: float) -> list[tuple[int, float]]:
    """The cell that contains `position`, or two cells with weights that sum to one within `ramp` of a border."""
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
    """Features of each patch of a page, `[rows * 24, FEATURES]`, rows from the top."""
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
    """Features of each patch of a scene, `[rows * 24, FEATURES]`: shapes and colours, at their centres."""
    table = blank(scene.height // PATCH)
    for thing in scene.things:
        for row, high in split_weight(thing.y / PATCH, RAMP_Y):
            for column, wide in split_weight(thing.x / PATCH, RAMP_Y):
                amount = THING_WEIGHT * high * wide
                table[row, column, FIRST_SHAPE + SHAPES.index(thing.shape)] += amount
                table[row, column, FIRST_COLOR + list(COLORS).index(thing.color)] += amount
    return table.reshape(-1, FEATURES)


def features(image: Page | Scene) -> np.ndarray:
    """Features of each patch of an image, `[rows * 24, FEATURES]`."""
    return page_features(image) if isinstance(image, Page) else scene_features(image)


def blank(rows: int) -> np.ndarray:
    """Features of empty patches, which are their positions, `[rows, 24, FEATURES]`."""
    table = np.zeros((rows, GRID, FEATURES), dtype=np.float32)
    table[:, :, BASE] = 1
    table[:, :, WHERE_X] = np.linspace(-1, 1, GRID)
    table[:, :, WHERE_Y] = np.linspace(-1, 1, GRID)[:rows, None]
    return table
