"""Pages whose text is known character by character, to find out which heads of a model read."""

import numpy as np

from sparsight.calibrate import Transcript
from sparsight.zoo.page import LETTERS, WIDTH, Page
from sparsight.zoo.tasks import read_out


def random_transcript(rng: np.random.Generator, records: int = 12) -> Transcript:
    """A list of records, one a line, and the text that reads it out."""
    example = read_out(rng, "train", records)
    page = example.images[0]
    assert isinstance(page, Page)
    return Transcript(page.draw(), example.turns[0][1], places_of(page, example.turns[0][1]))


def places_of(page: Page, text: str) -> tuple[tuple[float, float] | None, ...]:
    """Where a page of records shows each character of the text that reads it out as "KQ 482", a record a line."""
    centres = page.centres()
    # A record is printed as two letters, a separator that may have marks of its own, and the value.
    starts = [i for i, (char, _, _) in enumerate(centres) if char in LETTERS][::2]
    stops = [*starts[1:], len(centres)]
    places: list[tuple[float, float] | None] = []
    for line, start, stop in zip(text.split("\n"), starts, stops, strict=True):
        key, value = line.split(" ")
        printed = centres[start : start + len(key)] + centres[stop - len(value) : stop]
        assert "".join(char for char, _, _ in printed) == key + value
        spots = [(x / WIDTH, y / page.height) for _, x, y in printed]
        places += [*spots[: len(key)], None, *spots[len(key) :], None]
    return tuple(places[:-1])
