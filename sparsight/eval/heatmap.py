"""The figure of what a cache kept: patches kept and dropped, and bars of kept entries and sparsity by layer."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparsight.models.layouts import Tile
from sparsight.utils.plot_style import COLORS, DPI, FAINT, INK, MUTED

GROUPS = 4
"""Panels beside each tile, each a group of layers."""

MOMENTS = 10
"""Moments of an answer beside each other, at most."""

WIDTH, MARGIN, GAP, CAPTION, HEADER, BARS = 12.0, 0.45, 0.22, 0.3, 1.35, 1.55
"""Inches."""

FONT = "DejaVu Sans"
UNKNOWN, NO_FONT = "[…]", "  ([…]: no installed font has these characters)"

ACCENT, SECOND = COLORS[:2]
MARKER, PAPER = np.array([1.0, 0.68, 0.17]), np.array([0.955, 0.965, 0.975])


@dataclass(frozen=True)
class Kept:
    """The entries that a cache kept of one prompt.

    Args:
        layers: the numbers of the compressed layers; the other fields have the same order.
        by_position: fraction of a layer's KV heads that keep each prompt position, ``[L, T]``.
        by_layer: fraction of the prompt's entries that each layer keeps.
        sparsity: sparsity of each layer, None where the method does not measure it.
    """

    layers: Sequence[int]
    by_position: Tensor
    by_layer: Sequence[float]
    sparsity: Sequence[float] | None


@dataclass(frozen=True)
class Moment:
    """What a cache holds while a part of the answer is generated.

    Args:
        text: the part.
        by_position: fraction of all layers' KV heads that hold each prompt position, ``[T]``.
    """

    text: str
    by_position: Tensor


def layer_groups(layers: int) -> list[list[int]]:
    """Layers in order, in at most :data:`GROUPS` groups of nearly equal size."""
    return [group.tolist() for group in np.array_split(np.arange(layers), min(GROUPS, layers))]


def layer_names(layers: Sequence[int]) -> str:
    """The numbers of layers, consecutive ones as a range."""
    if len(layers) == 1:
        return f"Layer {layers[0]}"
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"Layers {layers[0]}–{layers[-1]}"  # noqa: RUF001
    return f"Layers {', '.join(map(str, layers))}"


def marked(tile: Tile, share: Tensor, scale: int = 1) -> NDArray[np.uint8]:
    """A tile with its kept cells highlighted and the others faded, ``[H * scale, W * scale, 3]``.

    Args:
        tile: the tile, pixels in ``[0, 1]``.
        share: fraction of KV heads that keep each cell, ``[rows, columns]``.
        scale: enlargement in both directions.
    """
    pixels = enlarged(tile, scale)
    height, width = (side // cells for side, cells in zip(pixels.shape[:2], share.shape, strict=True))
    strength = share.numpy().repeat(height, 0).repeat(width, 1)[..., None] ** 0.75
    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    # Kept black patches get much of the marker's colour, to look different from dropped ones.
    kept = MARKER * (0.6 + 0.2 * pixels + 0.2 * grey)
    dropped = 0.72 * PAPER + 0.28 * grey
    return np.asarray((strength * kept + (1 - strength) * dropped) * 255 + 0.5).astype(np.uint8)


def enlarged(tile: Tile, scale: int) -> NDArray[np.float64]:
    """A tile's pixels, ``[H * scale, W * scale, 3]``, interpolated."""
    image = Image.fromarray((tile.pixels.numpy() * 255 + 0.5).astype(np.uint8))
    return np.asarray(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)) / 255


def draw(
    tiles: Sequence[Tile], kept: Kept, title: str, subtitle: str, footnote: str = "", moments: Sequence[Moment] = ()
) -> Figure:
    """The figure: each tile with a panel per group of layers beside it, moments of an answer, then bars by layer."""
    groups = layer_groups(len(kept.by_layer))
    blocks = [_Block(tile, len(groups)) for tile in tiles]
    strip = _Strip(tiles, moments)
    height = HEADER + sum(block.height for block in blocks) + strip.height + BARS + 1.35
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    page = _Page(figure, height)
    page.text(MARGIN, 0.62, title, size=17, weight="bold")
    families = font_families("".join(subtitle.split()))
    known = frozenset(" ").union(*(characters(findfont(family)) for family in families))
    page.text(MARGIN, 0.93, one_line(subtitle, known), size=10.5, color=MUTED, family=families)
    top = HEADER
    for block in blocks:
        block.paint(page, top, kept, groups)
        top += block.height
    strip.paint(page, top)
    _legend(page)
    _bars(page, top + strip.height + 0.25, kept)
    page.text(MARGIN, height - 0.25, footnote, size=8, color=MUTED)
    return figure


def one_line(text: str, known: Collection[str], limit: int = 100) -> str:
    """A text on one line of at most ``limit`` columns, with a note where it has characters that are not ``known``."""
    line = " ".join(text.split())
    shown = re.sub("(?s:.)", lambda match: match[0] if match[0] in known else "\0", line)
    if "\0" not in shown:
        return _cut(line, limit)
    return _cut(re.sub("\0+( \0+)*", UNKNOWN, shown), limit - len(NO_FONT)) + NO_FONT


def _cut(line: str, limit: int) -> str:
    """A line cut to ``limit`` columns, of which East Asian characters take two."""
    columns = list(accumulate(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line))
    if not columns or columns[-1] <= limit:
        return line
    return line[: sum(column < limit for column in columns)].rstrip() + "…"


def font_families(text: str) -> list[str]:
    """The default font, and installed fonts for the characters of a text that it lacks."""
    families = [FONT]
    missing = set(text) - characters(findfont(FONT))
    for entry in sorted(fontManager.ttflist, key=lambda entry: entry.name):
        is_regular = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        # The font of last resort has a placeholder for every character.
        if missing and is_regular and "Last" not in entry.name and missing & characters(entry.fname):
            families.append(entry.name)
            missing -= characters(entry.fname)
    return families


@lru_cache(maxsize=256)
def characters(font: str) -> frozenset[str]:
    """The characters of a font file."""
    return frozenset(map(chr, get_font(font).get_charmap()))


class _Page:
    """A figure measured in inches from its top left corner."""

    def __init__(self, figure: Figure, height: float) -> None:
        self.figure, self.height = figure, height

    def text(self, left: float, baseline: float, text: str, **style: Any) -> None:
        style = {"color": INK, "va": "baseline", **style}
        # Dollar signs in a prompt are not mathematics.
        self.figure.text(left / WIDTH, 1 - baseline / self.height, text, parse_math=False, **style)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        )


class _Block:
    """One tile on the left, and its panels beside it in rows of the same total height."""

    def __init__(self, tile: Tile, panels: int) -> None:
        self.tile = tile
        aspect = tile.pixels.shape[1] / tile.pixels.shape[0]
        self.rows = min(panels, 2 if aspect > 0.7 else 1)
        self.columns = -(-panels // self.rows)
        # The widths of tile, panels and gaps add up to the page's; the heights of panels and captions to the tile's.
        between = (self.rows - 1) * (GAP / 2 + CAPTION)
        free = WIDTH - 2 * MARGIN - self.columns * GAP
        self.small_height = (free - between * aspect) / (aspect * (self.rows + self.columns))
        self.small_width = self.small_height * aspect
        self.large_height = self.rows * self.small_height + between
        self.large_width = self.large_height * aspect
        self.height = CAPTION + self.large_height + GAP

    def paint(self, page: _Page, top: float, kept: Kept, groups: Sequence[Sequence[int]]) -> None:
        tile = self.tile
        scale = max(1, round(self.large_width * DPI / tile.pixels.shape[1]))
        rows, columns = tile.tokens.shape
        large = (self.large_width, self.large_height)
        cells = f"{columns} × {rows}" + (" patches" if self.large_width > 3 else "")  # noqa: RUF001
        self._panel(page, MARGIN, top, large, enlarged(tile, scale), tile.name or "Image", cells)
        for number, group in enumerate(groups):
            row, column = divmod(number, self.columns)
            left = MARGIN + self.large_width + GAP + column * (self.small_width + GAP)
            above = top + row * (self.small_height + GAP / 2 + CAPTION)
            share = kept.by_position[group].mean(0)[tile.tokens]
            name = layer_names([kept.layers[index] for index in group])
            small = (self.small_width, self.small_height)
            self._panel(page, left, above, small, marked(tile, share, scale), name, f"{float(share.mean()):.1%} kept")

    def _panel(
        self,
        page: _Page,
        left: float,
        top: float,
        size: tuple[float, float],
        pixels: NDArray[Any],
        name: str,
        figure: str,
    ) -> None:
        page.text(left, top + CAPTION - 0.1, name, size=10, weight="bold")
        page.text(left + size[0], top + CAPTION - 0.1, figure, size=9, color=MUTED, ha="right")
        axes = page.axes(left, top + CAPTION, *size)
        axes.imshow(pixels, interpolation="antialiased", aspect="auto", extent=(0, 1, 1, 0))
        axes.set(xticks=(), yticks=())
        # A frame around white images.
        axes.spines[:].set(color=FAINT, linewidth=0.8)
        rows, columns = self.tile.tokens.shape
        for place in self.tile.seams[0]:
            axes.axhline(place / rows, color="white", linewidth=1, alpha=0.8)
        for place in self.tile.seams[1]:
            axes.axvline(place / columns, color="white", linewidth=1, alpha=0.8)


class _Strip:
    """Each tile at the moments of an answer, at most :data:`MOMENTS`, spread evenly."""

    def __init__(self, tiles: Sequence[Tile], moments: Sequence[Moment]) -> None:
        places = np.linspace(0, len(moments) - 1, min(MOMENTS, len(moments))).round().astype(int)
        self.tiles, self.moments = tiles, [moments[place] for place in places]
        self.width = (WIDTH - 2 * MARGIN - (MOMENTS - 1) * GAP / 2) / MOMENTS
        self.heights = [self.width * tile.pixels.shape[0] / tile.pixels.shape[1] for tile in tiles]
        self.height = CAPTION + sum(CAPTION + height for height in self.heights) + GAP if moments else 0.0

    def paint(self, page: _Page, top: float) -> None:
        if not self.moments:
            return
        page.text(MARGIN, top + CAPTION - 0.1, "Held while the answer is generated", size=10, weight="bold")
        families = font_families("".join("".join(moment.text.split()) for moment in self.moments))
        known = frozenset(" ").union(*(characters(findfont(family)) for family in families))
        top += CAPTION
        for tile, height in zip(self.tiles, self.heights, strict=True):
            for number, moment in enumerate(self.moments):
                left = MARGIN + number * (self.width + GAP / 2)
                part = one_line(moment.text, known, 14)
                page.text(left, top + CAPTION - 0.1, part, size=8, color=MUTED, family=families)
                axes = page.axes(left, top + CAPTION, self.width, height)
                axes.imshow(marked(tile, moment.by_position[tile.tokens]), aspect="auto")
                axes.set(xticks=(), yticks=())
                axes.spines[:].set(color=FAINT, linewidth=0.8)
            top += CAPTION + height


def _legend(page: _Page) -> None:
    """The color bar."""
    right, width = WIDTH - MARGIN, 1.9
    white = Tile("", torch.ones(1, 65, 3), torch.zeros(1, 65, dtype=torch.int64))
    bar = page.axes(right - width, 0.52, width, 0.14)
    bar.imshow(marked(white, torch.linspace(0, 1, 65)[None]), aspect="auto")
    bar.set_axis_off()
    page.text(right - width, 0.42, "KV heads that keep a patch", size=9, color=MUTED)
    page.text(right - width, 0.82, "none", size=8.5, color=MUTED)
    page.text(right, 0.82, "all", size=8.5, color=MUTED, ha="right")


def _bars(page: _Page, top: float, kept: Kept) -> None:
    """Bars by layer: entries kept, and sparsity if it was measured."""
    charts = [("Entries kept of the prompt", kept.by_layer, max(kept.by_layer) * 1.1, ACCENT)]
    if kept.sparsity is not None:
        charts.append(("Sparsity of post-vision attention", kept.sparsity, 1.0, SECOND))
    between, ticks = 0.5, 0.5
    width = (WIDTH - 2 * MARGIN - (len(charts) - 1) * between) / len(charts)
    for number, (name, values, highest, colour) in enumerate(charts):
        left = MARGIN + number * (width + between)
        mean = sum(values) / len(values)
        page.text(left, top + CAPTION - 0.1, name, size=10, weight="bold")
        page.text(left + width, top + CAPTION - 0.1, f"mean {mean:.1%}", size=9, color=MUTED, ha="right")
        axes = page.axes(left + ticks, top + CAPTION + 0.08, width - ticks, BARS - CAPTION)
        axes.bar(range(len(values)), values, color=colour, width=0.7)
        axes.axhline(mean, color=INK, linewidth=0.8, dashes=(4, 3))
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_ylim(0, highest)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(partial(_layer_number, kept.layers))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if highest > 0.04 else 1))
        axes.set_xlabel("layer", size=9, color=MUTED, labelpad=2)
        axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)


def _layer_number(layers: Sequence[int], place: float, _: int | None) -> str:
    """The number of the layer whose bar is at a position; empty beside the bars."""
    return str(layers[round(place)]) if 0 <= round(place) < len(layers) else ""
