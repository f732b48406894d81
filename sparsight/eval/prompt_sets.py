"""Prompts and transcripts with images: generated pages, or a user's own from a file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sparsight.eval.tasks import task
from sparsight.models.images import open_image
from sparsight.reader.transcript import Transcript


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
    return (_parse(path, number, line, max_pixels) for number, line in enumerate(_lines(path, "prompts")[:count], 1))


def read_transcripts(path: Path, count: int) -> list[Transcript]:
    """The first transcripts of a JSON-lines file, one image per line.

    ``{"image": "page.png", "text": "A 1", "places": [[0.1, 0.2], null, [0.3, 0.2]]}`` has a place for every character:
    fractions of the image's width and height, or null where the image does not show it. Image paths are relative to the
    file's folder.

    Raises:
        ValueError: the file cannot be read or has no transcripts, a line is not such an object, or an image is invalid.
    """
    return [_transcript(path, *line) for line in enumerate(_lines(path, "transcripts")[:count], 1)]


def _transcript(path: Path, number: int, line: str) -> Transcript:
    try:
        given: Any = json.loads(line)
        image, text = given["image"], given["text"]
        places = tuple(None if place is None else (float(place[0]), float(place[1])) for place in given["places"])
        inside = all(0 <= side <= 1 for place in places if place is not None for side in place)
        if not isinstance(image, str) or not isinstance(text, str) or len(places) != len(text) or not inside:
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}, line {number} is not an object such as {{"image": "page.png", "text": "A 1", "places": '
            "[[0.1, 0.2], null, [0.3, 0.2]]}, with a place in the image, or null, for every character of the text."
        ) from error
    return Transcript(open_image(path.parent / image), text, places)


def _lines(path: Path, name: str) -> list[str]:
    """Lines of a file that are not blank; an error calls them ``name``."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"Cannot read {path}: {reason}.") from error
    if not lines:
        raise ValueError(f"{path} has no {name}.")
    return lines


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
