"""Scenes: a few coloured shapes on a plain background, and their rendering."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sparsight.reader.page import WIDTH, is_held_out

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 170),
}
OVERSAMPLE = 3


@dataclass(frozen=True)
class Thing:
    """A coloured shape, with its centre and radius in pixels."""

    shape: str
    color: str
    x: int
    y: int
    radius: int
    tint: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Shapes on a plain background; `seed` is the seed of the noise."""

    things: tuple[Thing, ...]
    ground: tuple[int, int, int]
    noise: float
    height: int = WIDTH
    seed: int = 0

    def draw(self) -> Image.Image:
        """Render the image: RGB, 336 pixels wide."""
        large = Image.new("RGB", (WIDTH * OVERSAMPLE, self.height * OVERSAMPLE), self.ground)
        pen = ImageDraw.Draw(large)
        for thing in self.things:
            points = [(OVERSAMPLE * (thing.x + dx), OVERSAMPLE * (thing.y + dy)) for dx, dy in outline(thing)]
            pen.polygon(points, fill=thing.tint)
        pixels = np.asarray(large.reduce(OVERSAMPLE), dtype=np.float32)
        if self.noise:
            rng = np.random.default_rng(self.seed)
            pixels = pixels + self.noise * rng.standard_normal((self.height, WIDTH, 1), dtype=np.float32)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of the shape relative to its centre, in pixels."""
    r = float(thing.radius)

    def ring(count: int, start: float) -> list[tuple[float, float]]:
        fractions = [start + i / count for i in range(count)]
        return [(r * math.cos(math.tau * t), r * math.sin(math.tau * t)) for t in fractions]

    match thing.shape:
        case "circle":
            return ring(40, 0.0)
        case "square":
            return ring(4, 0.125)
        case "triangle":
            return ring(3, -0.25)
        case _:
            a, b = 0.3 * r, 0.95 * r
            right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
            return right + [(-x, -y) for x, y in right]


def random_scene(rng: np.random.Generator, split: str = "train", height: int = WIDTH) -> Scene:
    """A scene of one to four shapes that do not touch."""
    while True:
        count = int(rng.integers(1, 5))
        things: list[Thing] = []
        for _ in range(60):
            if len(things) == count:
                break
            radius = int(rng.integers(11, 19))
            x = int(rng.integers(radius + 4, WIDTH - radius - 4))
            y = int(rng.integers(radius + 4, height - radius - 4))
            if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 6 for t in things):
                color = list(COLORS)[rng.integers(len(COLORS))]
                r, g, b = (int(v) for v in (np.array(COLORS[color]) + rng.integers(-14, 15, 3)).clip(0, 255))
                things.append(Thing(SHAPES[rng.integers(len(SHAPES))], color, x, y, radius, (r, g, b)))
        if len(things) == count and is_held_out(tuple(things)) == (split == "heldout"):
            break
    shade = int(rng.integers(225, 256) if rng.random() < 0.7 else rng.integers(10, 40))
    noise = float(rng.uniform(1, 6)) if rng.random() < 0.5 else 0.0
    return Scene(tuple(things), (shade, shade, shade), noise, height, int(rng.integers(2**31)))
