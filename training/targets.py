"""What a patch of a picture says, as a vector: the language the eyes are taught to speak and the decoder to read.

A patch's vector is a sum of directions that are orthogonal to each other: one that every patch has, two for where it
stands, one for each character in each third of the patch, and one for each shape and each colour of a thing whose
centre it holds. The borders between thirds and patches are ramps about a pixel wide, since no eye can tell on which
side of a border a character stands exactly.
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
"""There are few things in a picture: what is seen of them must stand out."""
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
    """What patches that show a character have in common, of length one."""
    return torch.stack([directions[glyph_feature(char, slot)] for slot in range(SLOTS)]).sum(0) * SLOTS**-0.5


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
    """What each patch of a scene shows, `[rows * 24, FEATURES]`: things, at their centres."""
    table = blank(scene.height // PATCH)
    for thing in scene.things:
        for row, high in split_weight(thing.y / PATCH, RAMP_Y):
            for column, wide in split_weight(thing.x / PATCH, RAMP_Y):
                amount = THING_WEIGHT * high * wide
                table[row, column, FIRST_SHAPE + SHAPES.index(thing.shape)] += amount
                table[row, column, FIRST_COLOR + list(COLORS).index(thing.color)] += amount
    return table.reshape(-1, FEATURES)


def features(image: Page | Scene) -> np.ndarray:
    """What each patch of an image shows, `[rows * 24, FEATURES]`."""
    return page_features(image) if isinstance(image, Page) else scene_features(image)


def blank(rows: int) -> np.ndarray:
    """Patches that show nothing but where they stand, `[rows, 24, FEATURES]`."""
    table = np.zeros((rows, GRID, FEATURES), dtype=np.float32)
    table[:, :, BASE] = 1
    table[:, :, WHERE_X] = np.linspace(-1, 1, GRID)
    table[:, :, WHERE_Y] = np.linspace(-1, 1, GRID)[:rows, None]
    return table
