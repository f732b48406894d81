"""Rows, from what a JSON line or a mapping in Python holds."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsight.batch_inference.rows import Row, parse_row

PLACE = ("Line", 3)


def parse(values: Any, **options: Any) -> Row:
    return parse_row(values, PLACE, Path("folder"), None, **options)


def test_images_are_paths_bytes_data_urls_or_open_images() -> None:
    image = Image.new("RGB", (2, 2))
    url = "data:image/png;base64," + base64.b64encode(b"bytes").decode()
    images = ["a.png", "/b.png", Path("c.png"), b"bytes", url, image, {"bytes": None, "path": "d.png"}]
    row = parse({"id": "a", "images": images, "prompt": "What?"})
    paths = [Path("folder/a.png"), Path("/b.png"), Path("folder/c.png")]
    assert row == Row("a", (*paths, b"bytes", b"bytes", image, Path("folder/d.png")), "What?")


@pytest.mark.parametrize(
    ("row_id", "complaint"),
    [
        (None, "Line 3 has no 'id', a string or an integer."),
        (1.0, "Line 3 has the id 1.0, a float; ids are strings or integers (pandas makes integers floats"),
        (True, "Line 3 has the id True, a bool; ids are strings or integers."),
        ([1], "Line 3 has the id [1], a list; ids are strings or integers."),
        (2**63, "Line 3 has an integer 'id' of more than 64 bits."),
        ("\udcff", "Line 3 has the id '\\udcff', which is not valid Unicode."),
    ],
)
def test_a_row_without_a_valid_id_is_identified_by_its_number(row_id: Any, complaint: str) -> None:
    row = parse({"id": row_id, "image": "a.png", "prompt": "x"})
    assert (row.id, row.number, row.key, row.checksum) == (None, 3, (3,), None)
    assert row.malformed.startswith(complaint)
    assert row.malformed.endswith(".")


@pytest.mark.parametrize("row_id", ["1", 1, -(2**63), 2**63 - 1, np.int64(7), ""])
def test_ids_keep_their_type(row_id: Any) -> None:
    row = parse({"id": row_id, "image": "a.png", "prompt": "x"})
    assert row.malformed == ""
    assert (row.id, row.key) == (row_id, row_id)
    assert isinstance(row.id, str if isinstance(row_id, str) else int)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (
            "https://example.org/a.png",
            "has the image 'https://example.org/a.png': images are paths of files, URLs are not",
        ),
        ("file:///a.png", "has the image 'file:///a.png': images are paths of files, URLs are not opened."),
        ("data:image/png,abc", "has a data: URL that is not base64."),
        ("data:image/png;base64,***", "has a data: URL that is not base64."),
        ("", "has no 'image' or 'images': paths of files, the files' bytes, or data: URLs."),
        (b"", "has no 'image' or 'images'"),
        (3, "has no 'image' or 'images'"),
        ([], "has no 'image' or 'images'"),
    ],
)
def test_what_cannot_be_an_image(image: Any, complaint: str) -> None:
    row = parse({"id": 7, "image": image, "prompt": "x"})
    assert row.malformed.startswith(f"Row 7 {complaint}")


def test_a_prompt_is_a_text() -> None:
    assert parse({"id": 7, "image": "a.png", "prompt": 5}).malformed == "Row 7 has the prompt 5, which is not a text."
    assert parse({"id": 7, "image": "a.png"}).malformed == "Row 7 has no 'prompt', and none was given for all rows."


def test_long_names_are_cut_and_control_characters_escaped() -> None:
    row = parse({"id": "a\x1b[31m\u202e" + "b" * 10_000, "prompt": "x"})
    assert row.id == "a\x1b[31m\u202e" + "b" * 10_000
    assert row.malformed.startswith("Row 'a\\x1b[31m\\u202ebb")
    assert len(row.malformed) < 250


def test_fields_are_kept_as_json_has_them() -> None:
    values = {"id": 1, "image": "a.png", "prompt": "x", "label": float("nan"), "tags": [1, "b"], "more": 1}
    assert parse(values, keep=("label", "tags", "none")).fields == {"label": None, "tags": [1, "b"]}
    assert (
        "cannot be kept, because JSON has no such values" in parse({**values, "label": {1}}, keep=["label"]).malformed
    )
    assert "not valid Unicode" in parse({**values, "label": "\ud800"}, keep=["label"]).malformed
