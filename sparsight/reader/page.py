"""Pages of printed records ("KQ: 482"): their contents, their geometry and their rendering.

A page knows the centre of every character, so that training targets for each patch come from the page's description
and not from its pixels. Text may begin at any pixel; it is not aligned with the patch grid.
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sparsight.reader.fonts import FACES, advance, bitmap, cap_height

WIDTH = 336
PATCH = 14
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
MARKS = ":=-./"
GLYPHS = LETTERS + DIGITS + MARKS
SEPARATORS = (" ", ": ", " = ", " - ", "  ")
TITLES = ("RECEIPT", "INVOICE", "PRICE LIST", "STOCK", "TABLE", "ORDER FORM", "SUMMARY", "REPORT")
MAX_ANGLE = 1.0
MIN_PITCH = 14
MARGIN_X = 8
MARGIN_Y = 6

Record = tuple[str, str]


@dataclass(frozen=True)
class Style:
    """How a page is printed: colours in RGB, `angle` in degrees counter-clockwise, `noise` in grey levels."""

    face: str
    size: int
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    angle: float
    noise: float
    separator: str


@dataclass(frozen=True)
class Glyph:
    """A character with the left end of its baseline and its advance, in pixels, before the page is rotated."""

    char: str
    x: int
    y: int
    advance: int


@dataclass(frozen=True)
class Page:
    """Records in reading order, printed in a style; `seed` is the seed of the noise."""

    records: tuple[Record, ...]
    style: Style
    glyphs: tuple[Glyph, ...]
    height: int = WIDTH
    seed: int = 0

    def centres(self) -> list[tuple[str, float, float]]:
        """Every character with its centre in the image, as (char, x, y) in pixels."""
        middle_x, middle_y = WIDTH / 2, self.height / 2
        cos, sin = math.cos(math.radians(self.style.angle)), math.sin(math.radians(self.style.angle))
        rise = cap_height(self.style.face, self.style.size) / 2
        placed = []
        for glyph in self.glyphs:
            dx, dy = glyph.x + glyph.advance / 2 - middle_x, glyph.y - rise - middle_y
            placed.append((glyph.char, middle_x + cos * dx + sin * dy, middle_y - sin * dx + cos * dy))
        return placed

    def draw(self) -> Image.Image:
        """Render the image: RGB, 336 pixels wide."""
        mask = np.zeros((self.height, WIDTH), np.uint8)
        for glyph in self.glyphs:
            shape, left, top = bitmap(self.style.face, self.style.size, glyph.char)
            x, y = glyph.x + left, glyph.y + top
            place = mask[y : y + shape.shape[0], x : x + shape.shape[1]]
            np.maximum(place, shape, out=place)
        if self.style.angle:
            mask = np.asarray(Image.fromarray(mask).rotate(self.style.angle, Image.Resampling.BICUBIC))
        cover = mask[..., None].astype(np.float32) / 255
        paper, ink = np.array(self.style.paper, np.float32), np.array(self.style.ink, np.float32)
        pixels = paper + (ink - paper) * cover
        if self.style.noise:
            rng = np.random.default_rng(self.seed)
            pixels += self.style.noise * rng.standard_normal((self.height, WIDTH, 1), dtype=np.float32)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def random_style(rng: np.random.Generator) -> Style:
    """A random font at a size with two to three digits per patch, dark on light or light on dark."""
    face = list(FACES)[rng.integers(len(FACES))]
    light, dark = tinted(rng, 215, 256, -25), tinted(rng, 0, 40, 25)
    ink, paper = (dark, light) if rng.random() < 0.7 else (light, dark)
    return Style(
        face=face,
        size=FACES[face][rng.integers(2)],
        ink=ink,
        paper=paper,
        angle=float(rng.uniform(-MAX_ANGLE, MAX_ANGLE)) if rng.random() < 0.3 else 0.0,
        noise=float(rng.uniform(1, 6)) if rng.random() < 0.5 else 0.0,
        separator=SEPARATORS[rng.integers(len(SEPARATORS))],
    )


def tinted(rng: np.random.Generator, low: int, high: int, tint: int) -> tuple[int, int, int]:
    """A grey level between `low` and `high` with up to `tint` added to each channel."""
    grey, shares = rng.integers(low, high), rng.random(3)
    red, green, blue = (int(grey + tint * share) for share in shares)
    return red, green, blue


def typeset(text: str, x: int, y: int, style: Style) -> list[Glyph]:
    """The characters of one line that begins at `x`, without blanks; `y` is the baseline."""
    line = []
    for char in text:
        step = advance(style.face, style.size, char)
        if char != " ":
            line.append(Glyph(char, x, y, step))
        x += step
    return line


def width_of(text: str, style: Style) -> int:
    """Printed width of a line in pixels."""
    return sum(advance(style.face, style.size, char) for char in text)


def is_held_out(content: object) -> bool:
    """Whether content belongs to the held-out split, which is one eighth of all contents, by checksum."""
    return zlib.crc32(repr(content).encode()) % 8 == 0


def random_records(rng: np.random.Generator, count: int, split: str, avoid: str = "") -> tuple[Record, ...]:
    """Records with distinct two-letter keys and three-digit values.

    Redrawn until the set of records falls into the split, so that the splits share no page.
    """
    keys = [a + b for a in LETTERS for b in LETTERS if a + b not in avoid]
    while True:
        chosen = [keys[i] for i in rng.choice(len(keys), count, replace=False)]
        values = ["".join(DIGITS[d] for d in rng.integers(0, 10, 3)) for _ in chosen]
        records = tuple(zip(chosen, values, strict=True))
        if is_held_out(records) == (split == "heldout"):
            return records


def capacity(height: int) -> int:
    """Lines that fit on a page."""
    return (height - 2 * MARGIN_Y) // MIN_PITCH


def random_page(rng: np.random.Generator, count: int, split: str = "train", height: int = WIDTH) -> Page:
    """A page of `count` records in separate grid cells. A page with one column is a list with close lines."""
    style = random_style(rng)
    lines = capacity(height)
    titled = height == WIDTH and rng.random() < 0.25
    heading = TITLES[rng.integers(len(TITLES))] if titled else ""
    lines -= bool(heading)
    fewest = -(-count // lines)
    columns = int(rng.integers(fewest, max(fewest, min(4, count)) + 1))
    if columns > 4:
        raise ValueError(f"{count} records do not fit into {columns} columns of {lines} lines")
    records = random_records(rng, count, split, avoid=heading)

    is_list = columns == 1
    used = count if is_list else int(rng.integers(-(-count // columns), lines + 1))
    pitch = MIN_PITCH if is_list else (height - 2 * MARGIN_Y) // (used + bool(heading))
    start = MARGIN_Y + int(rng.integers(height - 2 * MARGIN_Y - pitch * (used + bool(heading)) + 1))
    cells = np.sort(rng.choice(used * columns, count, replace=False))
    column_width = (WIDTH - 2 * MARGIN_X) // columns
    rise = cap_height(style.face, style.size)
    below = rise + (MIN_PITCH - rise) // 2
    shifts = rng.integers(min(pitch - MIN_PITCH, 10) + 1, size=columns)
    glyphs: list[Glyph] = []
    if heading:
        x = MARGIN_X + int(rng.integers(WIDTH - 2 * MARGIN_X - width_of(heading, style)))
        glyphs += typeset(heading, x, start + below, style)
    rows = [key + style.separator + value for key, value in records]
    spare = column_width - 9 - max(width_of(row, style) for row in rows)
    if spare < 0:
        rows = [f"{key} {value}" for key, value in records]
        spare = column_width - 9 - max(width_of(row, style) for row in rows)
    wander = rng.integers(max(spare, 0) + 1, size=1 if is_list else count)
    for cell, row, aside in zip(cells, rows, np.resize(wander, count), strict=True):
        line, column = divmod(int(cell), columns)
        top = start + (line + bool(heading)) * pitch + int(shifts[column])
        glyphs += typeset(row, MARGIN_X + column * column_width + int(aside), top + below, style)
    return Page(records, style, tuple(glyphs), height, int(rng.integers(2**31)))


def random_print(rng: np.random.Generator, height: int) -> Page:
    """Dense lines of random characters without records, for training the vision tower only."""
    style = random_style(rng)
    used = int(rng.integers(max(1, capacity(height) - 1), capacity(height) + 1))
    pitch = (height - 2 * MARGIN_Y) // used
    rise = cap_height(style.face, style.size)
    glyphs: list[Glyph] = []
    for line in range(used):
        x = MARGIN_X + int(rng.integers(PATCH))
        y = MARGIN_Y + line * pitch + int(rng.integers(pitch - MIN_PITCH + 1)) + rise + (MIN_PITCH - rise) // 2
        while x < WIDTH - MARGIN_X - 12:
            kind = rng.random()
            source = LETTERS if kind < 0.4 else DIGITS if kind < 0.8 else MARKS if kind < 0.9 else " "
            run = "".join(source[i] for i in rng.integers(len(source), size=rng.integers(1, 4)))
            glyphs += [g for g in typeset(run, x, y, style) if g.x + g.advance < WIDTH - MARGIN_X]
            x += width_of(run, style)
    return Page((), style, tuple(glyphs), height, int(rng.integers(2**31)))
