"""Prompts with images to analyze: generated pages, or a user's own from a file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sparsight.eval.tasks import task
from sparsight.models.images import open_image


@dataclass(frozen=True)
class ImagePrompt:
    """A question about some images."""

    images: tuple[Image, ...]
    prompt: str


def generate_prompts(seed: int, count: int) -> Iterator[ImagePrompt]:
    """Look-up questions about generated pages."""
    for number in range(count):
        example = task("look-up").example(seed, number)
        yield ImagePrompt(tuple(example.pictures()), example.turns[0][0])


def read_prompts(path: Path, count: int, max_pixels: int) -> Iterator[ImagePrompt]:
    """The first prompts of a JSON-lines file, ``{"image": "page.png", "prompt": "What is this?"}`` per line.

    ``images`` in place of ``image`` is a list of paths; both may be missing. Paths are relative to the file's folder.

    Raises:
        ValueError: the file cannot be read or has no prompts, a line is not such an object, or an image is invalid.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"Cannot read {path}: {reason}.") from error
    if not lines:
        raise ValueError(f"{path} has no prompts.")
    return (_parse(path, number, line, max_pixels) for number, line in enumerate(lines[:count], 1))


def _parse(path: Path, number: int, line: str, max_pixels: int) -> ImagePrompt:
    try:
        given: Any = json.loads(line)
        images, prompt = given.get("images", given.get("image", [])), given["prompt"]
        images = [images] if isinstance(images, str) else list(images)
        if not isinstance(prompt, str) or not all(isinstance(image, str) for image in images):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}, line {number} is not an object such as {{"image": "page.png", "prompt": "What is this?"}}.'
        ) from error
    return ImagePrompt(tuple(open_image(path.parent / image, max_pixels) for image in images), prompt)
