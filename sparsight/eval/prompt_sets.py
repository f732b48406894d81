"""Sets of prompts: a user's own, from a file, or generated pages."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sparsight.eval.tasks import task
from sparsight.models.images import open_image


@dataclass(frozen=True)
class Asked:
    """A question about some pictures."""

    images: tuple[Image, ...]
    prompt: str


def generated(seed: int, count: int) -> Iterator[Asked]:
    """Look-up questions about generated pages."""
    for number in range(count):
        example = task("look-up").example(seed, number)
        yield Asked(tuple(example.pictures()), example.turns[0][0])


def read(path: Path, count: int, max_pixels: int) -> Iterator[Asked]:
    """The first prompts of a JSON-lines file, ``{"image": "page.png", "prompt": "What is this?"}`` a line.

    ``images`` in place of ``image`` are several; both may be missing; their paths start at the file's folder.

    Raises:
        ValueError: the file cannot be read, or has no prompt, or a line is not such an object, or a picture is bad.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"Cannot read {path}: {reason}.") from error
    if not lines:
        raise ValueError(f"{path} has no prompts.")
    return (_asked(path, number, line, max_pixels) for number, line in enumerate(lines[:count], 1))


def _asked(path: Path, number: int, line: str, max_pixels: int) -> Asked:
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
    return Asked(tuple(open_image(path.parent / image, max_pixels) for image in images), prompt)
