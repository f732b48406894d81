"""Reading the input: rows of images and a prompt, from JSON lines, a folder of images, or Parquet."""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.batch_inference.parquet import parquet
from sparsight.models.images import FORMATS

EXAMPLE = '{"id": "7", "image": "page.png", "prompt": "What is this?"}'
ROWS_IN_MEMORY = 64
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Row:
    """A question about some images.

    Args:
        id: unique within the input.
        images: paths of image files, or their bytes.
        prompt: the question.
        malformed: why the row cannot be read, in one sentence; empty if it can.
    """

    id: str
    images: tuple[Path | bytes, ...] = ()
    prompt: str = ""
    malformed: str = ""

    @property
    def checksum(self) -> int | None:
        """The prompt's checksum, None for a malformed row."""
        return None if self.malformed else checksum(self.prompt)


def read_rows(source: Path, prompt: str | None) -> Iterator[Row]:
    """The rows of a file or folder; ``prompt`` is used for rows without one.

    A JSON-lines file has one row per line, :data:`EXAMPLE`, or ``images`` for several; paths are relative to the file's
    folder. A Parquet file has the same fields as columns, images as bytes or as ``{"bytes": ...}``. In a folder every
    image file at any depth is a row, and its id is its path.

    Raises:
        ValueError: the source cannot be read, lacks a column, or is a folder and there is no prompt.
    """
    try:
        if source.is_dir():
            yield from _folder_rows(source, prompt)
        elif source.suffix.lower() == ".parquet":
            yield from _parquet_rows(source, prompt)
        else:
            with open(source, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _parse_line(line, _place("line", number), source.parent, prompt)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"Cannot read {source}: {reason}.") from error


def read_ids(source: Path, prompt: str | None) -> dict[str, int | None]:
    """The ids of all rows in order, with the checksums of their prompts; images are not read.

    Raises:
        ValueError: as :func:`read_rows`, or there is no row, or two rows have the same id.
    """
    if source.suffix.lower() == ".parquet" and source.is_file():
        rows = _parquet_ids(source, prompt)
    else:
        rows = ((row.id, row.checksum) for row in read_rows(source, prompt))
    ids: dict[str, int | None] = {}
    for row_id, prompt_checksum in rows:
        if row_id in ids:
            raise _duplicate(row_id)
        ids[row_id] = prompt_checksum
    if not ids:
        raise ValueError(f"{source} has no rows.")
    return ids


def checksum(prompt: str) -> int:
    """CRC-32 of a prompt."""
    return zlib.crc32(prompt.encode("utf-8", "surrogatepass"))


def check_unique(ids: Iterable[str]) -> None:
    """Raise ValueError if an id occurs twice."""
    seen = set()
    for each in ids:
        if each in seen:
            raise _duplicate(each)
        seen.add(each)


def _duplicate(row_id: str) -> ValueError:
    return ValueError(f"Two rows have the id {row_id!r}: ids must be unique.")


def parse_row(values: Any, place: str, folder: Path, prompt: str | None) -> Row:
    """The row of a mapping such as :data:`EXAMPLE`; ``place`` is its id if it has none."""
    if not isinstance(values, Mapping):
        return Row(place, malformed=f"{place.capitalize()} is not an object such as {EXAMPLE}.")
    if not isinstance(values.get("id"), str | int):
        return Row(place, malformed=f"{place.capitalize()} has no 'id', a string or an integer.")
    row_id = str(values["id"])
    images: Any = values.get("image") if values.get("images") is None else values["images"]
    images = images if isinstance(images, list | tuple) else [images]
    images = [image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image for image in images]
    if not images or not all(image and isinstance(image, str | bytes | Path) for image in images):
        return Row(row_id, malformed=f"Row {row_id!r} has no 'image' or 'images': files, or the bytes of files.")
    row_prompt = prompt if values.get("prompt") is None else values["prompt"]
    if not isinstance(row_prompt, str):
        return Row(row_id, malformed=f"Row {row_id!r} has no 'prompt', and none was given for all rows.")
    return Row(row_id, tuple(image if isinstance(image, bytes) else folder / image for image in images), row_prompt)


def _parse_line(line: str, place: str, folder: Path, prompt: str | None) -> Row:
    try:
        return parse_row(json.loads(line), place, folder, prompt)
    except json.JSONDecodeError:
        return Row(place, malformed=f"{place.capitalize()} is not an object such as {EXAMPLE}.")


def _folder_rows(folder: Path, prompt: str | None) -> Iterator[Row]:
    if prompt is None:
        raise ValueError(f"{folder} is a folder of images, which needs a prompt.")
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.is_dir():
            yield Row(path.relative_to(folder).as_posix(), (path,), prompt)


def _parquet_rows(source: Path, prompt: str | None) -> Iterator[Row]:
    file = _parquet_file(source)
    columns = [name for name in ("id", "image", "images", "prompt") if name in file.schema_arrow.names]
    batches = file.iter_batches(ROWS_IN_MEMORY, columns=columns)
    for number, values in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
        yield parse_row(values, _place("row", number), source.parent, prompt)


def _parquet_ids(source: Path, prompt: str | None) -> Iterator[tuple[str, int | None]]:
    file = _parquet_file(source)
    columns = [name for name in ("id", "prompt") if name in file.schema_arrow.names]
    rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(columns=columns))
    for number, values in enumerate(rows, 1):
        row_prompt = prompt if values.get("prompt") is None else values["prompt"]
        row_id = _place("row", number) if values["id"] is None else str(values["id"])
        yield row_id, checksum(row_prompt) if isinstance(row_prompt, str) else None


def _parquet_file(source: Path) -> Any:
    """An open Parquet file with a column ``id``."""
    reader = parquet()
    try:
        file = reader.ParquetFile(source)
    except ValueError as error:
        raise ValueError(f"{source} is not a Parquet file.") from error
    if "id" not in file.schema_arrow.names:
        raise ValueError(f"{source} has no column 'id', only {', '.join(file.schema_arrow.names)}.")
    return file


def _place(what: str, number: int) -> str:
    """The id of a row that has none."""
    return f"{what} {number}"
