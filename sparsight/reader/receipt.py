"""Receipts and order forms: pages of records with a heading, rules and a closing line."""

import numpy as np

from sparsight.reader.fonts import cap_height
from sparsight.reader.page import MARGIN_X, WIDTH, Glyph, Page, random_records, random_style, typeset, width_of

HEADINGS = ("RECEIPT", "INVOICE", "ORDER FORM", "CASH SALE", "DELIVERY NOTE")
FAREWELLS = ("THANK YOU", "SIGNED", "PAID IN CASH", "GOODS RECEIVED")
MOST_RECORDS = 14


def random_receipt(rng: np.random.Generator, count: int, split: str = "train") -> Page:
    """A receipt with `count` records, at most 14, one per line, at a random place of an otherwise empty page."""
    if count > MOST_RECORDS:
        raise ValueError(f"a receipt fits {MOST_RECORDS} records, not {count}")
    style = random_style(rng)
    heading, farewell = HEADINGS[rng.integers(len(HEADINGS))], FAREWELLS[rng.integers(len(FAREWELLS))]
    number = f"NO. {rng.integers(10000):04d}"
    records = random_records(rng, count, split, avoid=f"{heading} {farewell} NO")
    rows = [key + style.separator + value for key, value in records]
    inner = max(width_of(line, style) for line in (*rows, heading, number, farewell))
    rule = "-" * (inner // width_of("-", style))

    lines = [heading, number, rule, *rows, rule, farewell]
    pitch = int(rng.integers(15, min(19, (WIDTH - 24) // len(lines)) + 1))
    left = int(rng.integers(MARGIN_X, WIDTH - MARGIN_X - inner))
    top = int(rng.integers(8, WIDTH - 8 - pitch * len(lines))) + cap_height(style.face, style.size)
    glyphs: list[Glyph] = []
    for number_of_line, line in enumerate(lines):
        centred = line in (heading, farewell)
        x = left + (inner - width_of(line, style)) // 2 if centred else left
        glyphs += typeset(line, x, top + number_of_line * pitch, style)
    return Page(records, style, tuple(glyphs), WIDTH, int(rng.integers(2**31)))
