from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from PIL import Image

from sparsight.eval.heatmap import (
    MARKER,
    NO_FONT,
    WIDTH,
    Kept,
    Moment,
    characters,
    draw,
    font_families,
    layer_groups,
    marked,
    one_line,
)
from sparsight.models.layouts import Tile
from sparsight.utils.plot_style import DPI, save


def white_tile(rows: int = 3, columns: int = 4, patch: int = 5) -> Tile:
    """White pixels, and tokens that start at the third position of the prompt."""
    tokens = 2 + torch.arange(rows * columns).view(rows, columns)
    return Tile("", torch.ones(rows * patch, columns * patch, 3), tokens)


def distance_to_marker(pixels: np.ndarray) -> np.ndarray:
    return np.abs(pixels / 255 - MARKER).sum(-1)


def panels(figure: Figure) -> list[np.ndarray]:
    """What each pair of axes with an image shows, as 8-bit RGB."""
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    return [image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8) for image in shown]


@pytest.mark.parametrize("scale", [1, 3])
def test_kept_cells_are_marked_and_the_others_faded(scale: int) -> None:
    tile = white_tile()
    share = torch.zeros(3, 4)
    share[1, 2] = 1
    pixels = marked(tile, share, scale)
    assert pixels.shape == (15 * scale, 20 * scale, 3)
    is_marked = distance_to_marker(pixels) < 0.02
    expected = np.zeros((15, 20), bool)
    expected[5:10, 10:15] = True
    assert (is_marked == expected.repeat(scale, 0).repeat(scale, 1)).all()


def test_the_marker_is_stronger_where_more_heads_keep_a_cell() -> None:
    pixels = marked(white_tile(1, 5), torch.tensor([[0, 0.25, 0.5, 0.75, 1]]))
    assert (np.diff(distance_to_marker(pixels)[0, ::5]) < -0.1).all()


def test_kept_and_dropped_cells_differ_on_black_and_on_white() -> None:
    for colour in (0.0, 1.0):
        tile = Tile("", torch.full((4, 8, 3), colour), torch.arange(2).view(1, 2))
        pixels = marked(tile, torch.tensor([[0.0, 1.0]])).astype(int)
        assert np.abs(pixels[0, 0] - pixels[0, -1]).max() > 80


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        (1, [[0]]),
        (3, [[0], [1], [2]]),
        (4, [[0], [1], [2], [3]]),
        (6, [[0, 1], [2, 3], [4], [5]]),
        (8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_layers_are_grouped_in_order(layers: int, groups: list[list[int]]) -> None:
    assert layer_groups(layers) == groups


def test_a_panel_shows_what_its_layers_keep() -> None:
    tile = white_tile()
    kept = torch.zeros(8, 20)
    # Layers 2 and 3 are the second group; position 7 is cell (1, 1).
    kept[2:4, 7] = 1
    # Text before and after the picture is in no panel.
    kept[:, :2] = kept[:, 14:] = 1
    figure = draw([tile], Kept(range(8), kept, [0.1] * 8, None), "title", "subtitle")
    picture, *groups = panels(figure)[:5]
    assert (picture == 255).all()
    assert len(groups) == 4
    for number, pixels in enumerate(groups):
        scale = pixels.shape[0] // 15
        is_marked = (distance_to_marker(pixels) < 0.02)[scale // 2 :: scale, scale // 2 :: scale]
        expected = np.zeros((15, 20), bool)
        expected[5:10, 5:10] = number == 1
        assert (is_marked == expected).all()
    assert "8.3% kept" in {text.get_text() for text in figure.texts}


def test_every_tile_has_its_own_panels_and_name() -> None:
    tiles = [white_tile(), Tile("Image 2, base", torch.zeros(20, 10, 3), torch.arange(8).view(4, 2))]
    figure = draw(tiles, Kept(range(2), torch.zeros(2, 20), [0.1] * 2, None), "title", "subtitle")
    # Two tiles with two layers each, and the legend.
    assert len(panels(figure)) == 2 * 3 + 1
    texts = [text.get_text() for text in figure.texts]
    assert {"Image", "4 × 3 patches", "Image 2, base", "2 × 4 patches"} <= set(texts)  # noqa: RUF001
    assert texts.count("Layer 0") == texts.count("Layer 1") == 2


def test_moments_of_an_answer_are_spread_evenly() -> None:
    tile, held = white_tile(), torch.zeros(31, 20)
    # At moment k only position 2 + k % 12, which is a cell of the tile, is held.
    held[range(31), [2 + number % 12 for number in range(31)]] = 1
    moments = [Moment(f"part\n{number}", each) for number, each in enumerate(held)]
    kept = Kept(range(1), torch.zeros(1, 20), [0.1], None)
    figure = draw([tile], kept, "title", "subtitle", moments=moments)
    # The tile, a layer, and the legend at the end.
    strip = panels(figure)[2:-1]
    shown = [0, 3, 7, 10, 13, 17, 20, 23, 27, 30]
    for number, pixels in zip(shown, strip, strict=True):
        cells = (distance_to_marker(pixels) < 0.02)[2::5, 2::5]
        assert cells.flatten().nonzero()[0].tolist() == [number % 12]
    texts = [text.get_text() for text in figure.texts]
    assert [text for text in texts if text.startswith("part")] == [f"part {number}" for number in shown]
    plain = draw([tile], kept, "title", "subtitle")
    assert "Held while the answer is generated" in set(texts) - {text.get_text() for text in plain.texts}
    assert plain.get_figheight() < figure.get_figheight()


def test_seams_are_drawn_in_every_panel() -> None:
    tile = Tile("", torch.ones(8, 8, 3), torch.arange(16).view(4, 4), seams=((2,), (1, 3)))
    figure = draw([tile], Kept(range(1), torch.zeros(1, 20), [0.1], None), "title", "subtitle")
    for axes in figure.axes[:2]:
        assert sorted(tuple(line.get_xdata()) for line in axes.lines) == [(0, 1), (0.25, 0.25), (0.75, 0.75)]


def test_bars_show_shares_and_sparsity() -> None:
    figure = draw(
        [white_tile()], Kept(range(3), torch.zeros(3, 20), [0.1, 0.3, 0.2], [0.9, 0.5, 0.4]), "title", "subtitle"
    )
    shares, sparsity = ([bar.get_height() for bar in axes.patches] for axes in figure.axes[-2:])
    assert shares == [0.1, 0.3, 0.2]
    assert sparsity == [0.9, 0.5, 0.4]
    texts = {text.get_text() for text in figure.texts}
    assert {"mean 20.0%", "mean 60.0%"} <= texts


def test_layers_have_the_models_numbers() -> None:
    kept = Kept([5, 11, 17, 23, 24, 25, 40, 41], torch.zeros(8, 20), [0.1] * 8, None)
    figure = draw([white_tile()], kept, "title", "subtitle")
    figure.canvas.draw()
    texts = {text.get_text() for text in figure.texts}
    assert {"Layers 5, 11", "Layers 17, 23", "Layers 24–25", "Layers 40–41"} <= texts  # noqa: RUF001
    ticks = {label.get_text() for label in figure.axes[-1].get_xticklabels()}
    assert ticks - {""} == {"5", "11", "17", "23", "24", "25", "40", "41"}


def test_sparsity_is_left_out_where_it_was_not_measured() -> None:
    figure = draw([white_tile()], Kept(range(3), torch.zeros(3, 20), [0.1] * 3, None), "title", "subtitle")
    assert sum(bool(axes.patches) for axes in figure.axes) == 1


@pytest.mark.parametrize("size", [(15, 60), (20, 20), (60, 10)])
@pytest.mark.parametrize("layers", [1, 2, 3, 32])
def test_nothing_overlaps_or_leaves_the_page(tmp_path: Path, size: tuple[int, int], layers: int) -> None:
    width, height = size
    tokens = torch.arange(width * height // 25).view(height // 5, width // 5)
    kept = Kept(range(layers), torch.rand(layers, tokens.numel()), [0.1] * layers, [0.5] * layers)
    tile = Tile("Image 2, high-res", torch.ones(height, width, 3), tokens)
    figure = draw([tile], kept, "What vl-cache keeps at a 10% budget", "word " * 40, "footnote")
    save(figure, tmp_path / "picture.png")
    image = Image.open(tmp_path / "picture.png")
    assert image.format == "PNG"
    assert image.width == round(WIDTH * DPI)
    assert image.height == pytest.approx(figure.get_size_inches()[1] * DPI, abs=1)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= image.width and box.y1 <= image.height
        assert not any(box.shrunk(0.99, 0.99).overlaps(other) for other in boxes[number + 1 :])
    words = [text.get_window_extent() for text in figure.texts]
    for number, box in enumerate(words):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= image.width and box.y1 <= image.height
        assert not any(box.overlaps(other) for other in words[number + 1 :] + boxes)
    # The cells are as wide as high.
    shown = figure.axes[0].get_window_extent()
    assert shown.width / shown.height == pytest.approx(width / height, rel=0.01)


def test_text_is_drawn_literally_on_one_line() -> None:
    figure = draw([white_tile()], Kept(range(1), torch.zeros(1, 20), [0.1], None), "title", "costs $5 and $6\n_x^2")
    assert "costs $5 and $6 _x^2" in [text.get_text() for text in figure.texts]
    assert not any(text.get_parse_math() for text in figure.texts)


def test_a_line_is_cut_by_its_width() -> None:
    latin = frozenset("a b c word")
    assert one_line("a b\n c", latin) == "a b c"
    assert one_line("word " * 40, latin, limit=12) == "word word w…"
    # East Asian characters are twice as wide.
    assert one_line("日" * 40, frozenset("日"), limit=12) == "日" * 5 + "…"


def test_characters_without_a_font_are_left_out_with_a_note() -> None:
    known = characters(findfont("DejaVu Sans"))
    assert one_line("Ελλάδα 日本 日本, ok?", known) == "Ελλάδα […], ok?" + NO_FONT
    assert len(one_line("日" * 200, known)) <= 100


def test_an_installed_font_is_used_for_characters_that_the_default_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    enclosing_circle = "\u20dd"
    assert enclosing_circle not in characters(findfont("DejaVu Sans"))
    assert font_families("plain") == ["DejaVu Sans"]
    stix = [font for font in fontManager.ttflist if font.name in ("STIXGeneral", "Last Resort High-Efficiency")]
    monkeypatch.setattr(fontManager, "ttflist", stix)
    assert font_families(enclosing_circle) == ["DejaVu Sans", "STIXGeneral"]
    figure = draw(
        [white_tile()], Kept(range(1), torch.zeros(1, 20), [0.1], None), "title", f"a{enclosing_circle} \u65e5"
    )
    (shown,) = [text for text in figure.texts if text.get_text() == f"a{enclosing_circle} […]" + NO_FONT]
    assert shown.get_family() == ["DejaVu Sans", "STIXGeneral"]


def test_percentages_at_the_axis_are_exact() -> None:
    for highest in (0.013, 0.05, 0.078, 0.2, 1.0):
        figure = draw([white_tile()], Kept(range(2), torch.zeros(2, 20), [highest, 0.01], None), "title", "subtitle")
        axis = figure.axes[-1].yaxis
        values = [tick for tick in axis.get_majorticklocs() if tick <= highest]
        assert len(values) > 1
        assert [float(axis.get_major_formatter()(value).rstrip("%")) for value in values] == pytest.approx(
            [100 * value for value in values]
        )
