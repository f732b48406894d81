"""Pages whose text is known character by character, to find out which heads of a model read."""

from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from sparsight.reader.page import WIDTH, Page
from sparsight.reader.skills import read_out

Place = tuple[float, float]


@dataclass(frozen=True)
class Transcript:
    """A picture with what is written in it.

    Args:
        picture: the picture.
        text: what an answer to "read this" would say.
        places: where the picture shows each character of the text, as fractions of its width and height; None where it
            does not.
    """

    picture: Image
    text: str
    places: tuple[Place | None, ...]


def random_transcript(rng: np.random.Generator, records: int = 12) -> Transcript:
    """A list of records, one a line, and the text that reads it out."""
    example = read_out(rng, "train", records)
    page = example.images[0]
    assert isinstance(page, Page)
    return Transcript(page.draw(), example.turns[0][1], places_of(page, example.turns[0][1]))


def places_of(page: Page, text: str) -> tuple[tuple[float, float] | None, ...]:
    """Where a list shows each character of the text that reads it out; marks that are not read are passed over."""
    printed = iter(page.centres())
    places: list[tuple[float, float] | None] = []
    for char in text:
        if char.isspace():
            places.append(None)
        else:
            x, y = next((x, y) for shown, x, y in printed if shown == char)
            places.append((x / WIDTH, y / page.height))
    return tuple(places)
