"""The shared style of all figures, and writing them as PNG."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DPI = 120
INK, MUTED, FAINT = "#1c2530", "#6a7683", "#d9dee3"
COLORS = (
    "#f0a020", "#4d7694", "#c8553d", "#588b4b", "#8a63a8", "#2a9d9d", "#d67aa8", "#8c6d4f", "#9aa5b1", "#b8b13a",
    "#3f51a3", "#e07b39", "#6b8e9f", "#a03a5c",
)  # fmt: skip
MARKERS = "osD^vP*Xhp<>dH"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        ValueError: the file cannot be written.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    try:
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(path, format="PNG", optimize=True)
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror}.") from error
