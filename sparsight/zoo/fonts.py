"""The typefaces that pages are printed in: those that matplotlib carries, so that every machine has the same ones."""

from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmss10",
    "cmtt10",
)

MIN_ADVANCE = 4.9
"""Pixels from one character to the next, at least: three narrow ones then still stand apart in a patch."""


@lru_cache(maxsize=512)
def font(face: str, size: float) -> ImageFont.FreeTypeFont:
    """The face at a size in pixels."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=64)
def digit_width(face: str) -> float:
    """Width of a digit as a fraction of the font size."""
    return font(face, 100).getlength("0") / 100


@lru_cache(maxsize=8192)
def advance(face: str, size: float, char: str) -> float:
    """Pixels from the left edge of `char` to the next character."""
    return max(font(face, 100).getlength(char) * size / 100, MIN_ADVANCE)


@lru_cache(maxsize=8192)
def inset(face: str, size: float, char: str) -> float:
    """Pixels between the left edge of `char`'s advance and the character itself."""
    return (advance(face, size, char) - font(face, size).getlength(char)) / 2


@lru_cache(maxsize=64)
def cap_height(face: str) -> float:
    """Height of a capital as a fraction of the font size."""
    return -font(face, 100).getbbox("H", anchor="ls")[1] / 100
