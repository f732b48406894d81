"""Rows of the input: a question about some images each."""

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.utils.text import is_unicode, quoted

EXAMPLE = '{"id": "7", "image": "page.png", "prompt": "What is this?"}'
URL = re.compile(r"(https?|ftp|file|s3|gs|hf):/", re.IGNORECASE)
"""Addresses that are easily mistaken for paths; a ``Path`` has one slash of the two."""

RowKey = str | int | tuple[int]
"""What identifies a row: its id, or, if it has none, its number in the input as a tuple."""


@dataclass(frozen=True)
class Row:
    """A question about some images.

    Args:
        id: unique within the input; None if the row has no valid id, which makes it malformed.
        images: paths of image files, their bytes, or open images.
        prompt: the question.
        malformed: why the row cannot be answered, in one sentence; empty if it can.
        number: line of a JSON-lines file or row of a Parquet file, counted from 1, if there is no id.
        fields: further fields of the input, which are copied into the result.
        place: where the row is in the input, such as ``Line 3``.
    """

    id: str | int | None
    images: tuple[Path | bytes | Image.Image, ...] = ()
    prompt: str = ""
    malformed: str = ""
    number: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def key(self) -> RowKey:
        """What identifies the row."""
        return row_key(self.id, self.number)

    @property
    def checksum(self) -> int | None:
        """The prompt's checksum, None for a malformed row."""
        return None if self.malformed else checksum(self.prompt)


def row_key(row_id: str | int | None, number: int | None) -> RowKey:
    """The key of a row by its id and number.

    Raises:
        ValueError: it has neither.
    """
    if row_id is not None:
        return row_id
    if number is None:
        raise ValueError("A row needs an id or a number.")
    return (number,)


def checksum(prompt: str) -> int:
    """CRC-32 of a prompt."""
    return zlib.crc32(prompt.encode("utf-8", "surrogatepass"))


def check_unique(rows: Iterable[Row]) -> None:
    """Raise ValueError if two rows have the same id."""
    seen: dict[RowKey, Row] = {}
    for row in rows:
        if row.key in seen:
            raise duplicate(seen[row.key], row)
        seen[row.key] = row


def duplicate(first: Row, second: Row) -> ValueError:
    """The error for two rows with the same id."""
    places = f"{first.place} and {second.place[:1].lower()}{second.place[1:]}"
    return ValueError(f"{places} have the id {quoted(first.key)}: ids must be unique.")


def parse_row(values: Any, place: tuple[str, int], folder: Path, prompt: str | None, keep: Iterable[str] = ()) -> Row:
    """The row of a mapping such as :data:`EXAMPLE`, malformed if anything in it is wrong.

    Args:
        values: the mapping.
        place: what a row is called and its number, such as ``("Line", 3)``.
        folder: where relative paths start.
        prompt: used if the row has none.
        keep: fields that are copied into the result.
    """
    label, number = f"{place[0]} {place[1]}", place[1]
    if not isinstance(values, Mapping):
        return Row(None, malformed=f"{label} is not an object such as {EXAMPLE}.", number=number)
    if problem := id_problem(values.get("id")):
        return Row(None, malformed=f"{label} {problem}.", number=number)
    row_id = values["id"] if isinstance(values["id"], str) else int(values["id"])
    try:
        row_prompt = prompt if values.get("prompt") is None else values["prompt"]
        if row_prompt is None:
            raise ValueError("has no 'prompt', and none was given for all rows")
        if not isinstance(row_prompt, str):
            raise ValueError(f"has the prompt {quoted(row_prompt)}, which is not a text")
        return Row(row_id, _images(values, folder), row_prompt, fields=_kept(values, keep), place=label)
    except ValueError as error:
        return Row(row_id, malformed=f"Row {quoted(row_id)} {error}.", place=label)


def id_problem(row_id: Any) -> str:
    """Why a value cannot be an id, as the rest of a sentence; empty if it can."""
    if row_id is None:
        return "has no 'id', a string or an integer"
    if isinstance(row_id, str):
        return "" if is_unicode(row_id) else f"has the id {quoted(row_id)}, which is not valid Unicode"
    if isinstance(row_id, float):
        hint = "pandas makes integers floats where one is missing, its type Int64 keeps them"
        return f"has the id {quoted(row_id)}, a float; ids are strings or integers ({hint})"
    if not isinstance(row_id, Integral) or isinstance(row_id, bool):
        return f"has the id {quoted(row_id)}, a {type(row_id).__name__}; ids are strings or integers"
    return "" if -(2**63) <= int(row_id) < 2**63 else "has an integer 'id' of more than 64 bits"


def _images(values: Mapping[str, Any], folder: Path) -> tuple[Path | bytes | Image.Image, ...]:
    images = values.get("image") if values.get("images") is None else values["images"]
    images = images if isinstance(images, list | tuple) else [images]
    if not images:
        raise ValueError("has no 'image' or 'images'")
    return tuple(_image(image, folder) for image in images)


def _image(image: Any, folder: Path) -> Path | bytes | Image.Image:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image.startswith("data:"):
        return _data_url(image)
    if isinstance(image, str) and URL.match(image):
        raise ValueError(f"has the image {quoted(image)}: images are paths of files, URLs are not opened")
    if isinstance(image, str | Path) and str(image):
        return folder / image
    if isinstance(image, Image.Image) or (isinstance(image, bytes) and image):
        return image
    raise ValueError("has no 'image' or 'images': paths of files, the files' bytes, or data: URLs")


def _data_url(url: str) -> bytes:
    header, _, data = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise binascii.Error
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("has a data: URL that is not base64") from error


def _kept(values: Mapping[str, Any], keep: Iterable[str]) -> dict[str, Any]:
    """The fields to keep, as JSON has them; NaN and infinity, which it has not, are None."""
    fields = {name: values[name] for name in keep if name in values}
    try:
        text = json.dumps(fields, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"has fields that cannot be kept, because JSON has no such values: {error}") from error
    if not is_unicode(text):
        raise ValueError("has fields to keep that are not valid Unicode")
    return json.loads(text, parse_constant=lambda _: None) if fields else {}
