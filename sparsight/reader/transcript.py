"""Pages with the position of each character of their text, for measuring which heads of a model read."""

from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from sparsight.reader.page import WIDTH, Page
from sparsight.reader.skills import read_out

Place = tuple[float, float]


@dataclass(frozen=True)
class Transcript:
    """An image with its transcript.

    Args:
        picture: the image.
        text: the transcript, as the answer to "Read the page."
        places: position of each character of the text in the image, as fractions of its width and height; None for
            characters that the image does not show, such as blanks.
    """

    picture: Image
    text: str
    places: tuple[Place | None, ...]


def random_transcript(rng: np.random.Generator, records: int = 12) -> Transcript:
    """A random list of records, one per line, with its transcript."""
    example = read_out(rng, "train", records)
    page = example.images[0]
    assert isinstance(page, Page)
    return Transcript(page.draw(), example.turns[0][1], places_of(page, example.turns[0][1]))


def places_of(page: Page, text: str) -> tuple[tuple[float, float] | None, ...]:
    """Position of each character of a list's transcript; printed marks missing from the transcript are skipped."""
    printed = iter(page.centres())
    places: list[tuple[float, float] | None] = []
    for char in text:
        if char.isspace():
            places.append(None)
        else:
            x, y = next((x, y) for shown, x, y in printed if shown == char)
            places.append((x / WIDTH, y / page.height))
    return tuple(places)
