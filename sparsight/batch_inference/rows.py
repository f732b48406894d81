"""What is asked: rows of pictures and a prompt, from JSON lines, a folder of pictures, or Parquet."""

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
READ_ROWS = 64
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Row:
    """A question about some pictures.

    Args:
        id: what tells it from all others.
        images: files, or what files of pictures hold.
        prompt: the question.
        malformed: what is wrong with the row, if it is not a question at all.
    """

    id: str
    images: tuple[Path | bytes, ...] = ()
    prompt: str = ""
    malformed: str = ""

    @property
    def checksum(self) -> int | None:
        """The prompt's, None where there is no question."""
        return None if self.malformed else checksum(self.prompt)


def read_rows(source: Path, prompt: str | None) -> Iterator[Row]:
    """The rows of a file or folder; ``prompt`` is that of the rows that have none.

    A JSON-lines file has a row a line, :data:`EXAMPLE`, with ``images`` for several; paths start at its folder. A
    Parquet file has these columns, its pictures as bytes, or as ``{"bytes": ...}``. In a folder every picture at any
    depth is a row, whose id is its path.

    Raises:
        ValueError: the source cannot be read, or lacks a column, or is a folder and there is no prompt.
    """
    try:
        if source.is_dir():
            yield from _of_folder(source, prompt)
        elif source.suffix.lower() == ".parquet":
            yield from _of_parquet(source, prompt)
        else:
            with open(source, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _of_line(line, _place("line", number), source.parent, prompt)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"Cannot read {source}: {reason}.") from error


def read_ids(source: Path, prompt: str | None) -> dict[str, int | None]:
    """The ids of all rows in their order, and the checksums of their prompts; pictures are not read.

    Raises:
        ValueError: as :func:`read_rows`, or there is no row, or two rows have the same id.
    """
    if source.suffix.lower() == ".parquet" and source.is_file():
        found = _ids_of_parquet(source, prompt)
    else:
        found = ((row.id, row.checksum) for row in read_rows(source, prompt))
    ids: dict[str, int | None] = {}
    for row, asked in found:
        if row in ids:
            raise _twice(row)
        ids[row] = asked
    if not ids:
        raise ValueError(f"{source} has no rows.")
    return ids


def checksum(prompt: str) -> int:
    """CRC-32 of a prompt."""
    return zlib.crc32(prompt.encode("utf-8", "surrogatepass"))


def check_different(ids: Iterable[str]) -> None:
    """Raise ValueError if an id comes twice."""
    seen = set()
    for each in ids:
        if each in seen:
            raise _twice(each)
        seen.add(each)


def _twice(row: str) -> ValueError:
    return ValueError(f"Two rows have the id {row!r}: every row needs its own.")


def row_of(given: Any, place: str, folder: Path, prompt: str | None) -> Row:
    """The row that a mapping such as :data:`EXAMPLE` stands for; ``place`` is its id if it has none."""
    if not isinstance(given, Mapping):
        return Row(place, malformed=f"{place.capitalize()} is not an object such as {EXAMPLE}.")
    if not isinstance(given.get("id"), str | int):
        return Row(place, malformed=f"{place.capitalize()} has no 'id', a text or a whole number.")
    name, asked = str(given["id"]), given.get("prompt")
    images: Any = given.get("image") if given.get("images") is None else given["images"]
    images = images if isinstance(images, list | tuple) else [images]
    held: list[Any] = [each.get("bytes") or each.get("path") if isinstance(each, Mapping) else each for each in images]
    if not held or not all(image and isinstance(image, str | bytes | Path) for image in held):
        return Row(name, malformed=f"Row {name!r} has no 'image' or 'images': files, or the bytes of files.")
    asked = prompt if asked is None else asked
    if not isinstance(asked, str):
        return Row(name, malformed=f"Row {name!r} has no 'prompt', and none was given for all rows.")
    return Row(name, tuple(image if isinstance(image, bytes) else folder / image for image in held), asked)


def _of_line(line: str, place: str, folder: Path, prompt: str | None) -> Row:
    try:
        return row_of(json.loads(line), place, folder, prompt)
    except json.JSONDecodeError:
        return Row(place, malformed=f"{place.capitalize()} is not an object such as {EXAMPLE}.")


def _of_folder(folder: Path, prompt: str | None) -> Iterator[Row]:
    if prompt is None:
        raise ValueError(f"{folder} is a folder of pictures: say with a prompt what is asked about them.")
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.is_dir():
            yield Row(path.relative_to(folder).as_posix(), (path,), prompt)


def _of_parquet(source: Path, prompt: str | None) -> Iterator[Row]:
    file = _parquet_file(source)
    columns = [name for name in ("id", "image", "images", "prompt") if name in file.schema_arrow.names]
    batches = file.iter_batches(READ_ROWS, columns=columns)
    for number, given in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
        yield row_of(given, _place("row", number), source.parent, prompt)


def _ids_of_parquet(source: Path, prompt: str | None) -> Iterator[tuple[str, int | None]]:
    file = _parquet_file(source)
    columns = [name for name in ("id", "prompt") if name in file.schema_arrow.names]
    rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(columns=columns))
    for number, given in enumerate(rows, 1):
        asked = prompt if given.get("prompt") is None else given["prompt"]
        name = _place("row", number) if given["id"] is None else str(given["id"])
        yield name, checksum(asked) if isinstance(asked, str) else None


def _parquet_file(source: Path) -> Any:
    """An open Parquet file, which must have ids."""
    reader = parquet()
    try:
        file = reader.ParquetFile(source)
    except ValueError as error:
        raise ValueError(f"{source} is no Parquet file.") from error
    if "id" not in file.schema_arrow.names:
        raise ValueError(f"{source} has no column 'id', but {', '.join(file.schema_arrow.names)}.")
    return file


def _place(what: str, number: int) -> str:
    """The id of a row that has none."""
    return f"{what} {number}"
