"""Numbered lists of records, "07. KQ: 482", one per line, with a final "END" line."""

import numpy as np

from sparsight.reader.fonts import cap_height
from sparsight.reader.page import (
    MARGIN_X,
    MARGIN_Y,
    MIN_PITCH,
    WIDTH,
    Glyph,
    Page,
    capacity,
    random_records,
    random_style,
    typeset,
    width_of,
)

END = "END"
MAX_PITCH = 18


def numbered(line: int) -> str:
    """The number in front of a record, counted from 1."""
    return f"{line:02d}."


def random_list(rng: np.random.Generator, count: int, split: str = "train", height: int = WIDTH) -> Page:
    """A list of `count` records at a random place of an otherwise empty page, with random line spacing."""
    if count >= capacity(height):
        raise ValueError(f"a page of {height} pixels fits {capacity(height) - 1} numbered lines, not {count}")
    style = random_style(rng)
    records = random_records(rng, count, split)
    rows = [*(key + style.separator + value for key, value in records), END]
    lines = [f"{numbered(i)} {row}" for i, row in enumerate(rows, 1)]
    pitch = int(rng.integers(MIN_PITCH, min(MAX_PITCH, (height - 2 * MARGIN_Y) // len(lines)) + 1))
    left = int(rng.integers(MARGIN_X, WIDTH - MARGIN_X - max(width_of(line, style) for line in lines)))
    rise = cap_height(style.face, style.size)
    top = MARGIN_Y + int(rng.integers(height - 2 * MARGIN_Y - pitch * len(lines) + 1))
    glyphs: list[Glyph] = []
    for at, line in enumerate(lines):
        glyphs += typeset(line, left, top + at * pitch + rise + (MIN_PITCH - rise) // 2, style)
    return Page(records, style, tuple(glyphs), height, int(rng.integers(2**31)))
