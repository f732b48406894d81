"""The fonts that pages are printed in: those that ship with matplotlib, so that every machine has the same ones."""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import ImageFont

FACES = {
    "DejaVuSans": (9, 11),
    "DejaVuSans-Bold": (9, 10),
    "DejaVuSerif": (10, 11),
    "DejaVuSansMono": (10, 11),
}
"""Each face with two sizes in pixels: a digit is 6 pixels wide in the first and 7 in the second."""

MIN_ADVANCE = 5
"""Smallest advance of a character in pixels, so that three narrow characters stay apart in a patch."""


@lru_cache(maxsize=16)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """The font at a size in pixels, hinted to the pixel grid."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1024)
def advance(face: str, size: int, char: str) -> int:
    """Pixels from the left edge of `char` to the next character."""
    return max(round(font(face, size).getlength(char)), MIN_ADVANCE)


@lru_cache(maxsize=1024)
def bitmap(face: str, size: int, char: str) -> tuple[np.ndarray, int, int]:
    """Coverage of `char` in 0..255, `[height, width]`, and the offset (x, y) in pixels of its upper left corner from
    the left end of the baseline.
    """
    drawn = font(face, size)
    mask, (left, top) = drawn.getmask2(char, "L", anchor="ls")
    inset = (advance(face, size, char) - round(drawn.getlength(char))) // 2
    return np.array(mask, dtype=np.uint8).reshape(mask.size[::-1]), left + inset, top


@lru_cache(maxsize=16)
def cap_height(face: str, size: int) -> int:
    """Height of a capital letter in pixels."""
    return bitmap(face, size, "H")[0].shape[0]
