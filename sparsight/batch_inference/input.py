"""Reading the input: JSON lines, Parquet, or a folder of images."""

import codecs
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.batch_inference.parquet import parquet
from sparsight.batch_inference.rows import EXAMPLE, URL, Row, RowKey, duplicate, parse_row
from sparsight.models.images import FORMATS
from sparsight.utils.text import printable, quoted

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TAKEN = f"The input is JSON lines ({', '.join(JSON_SUFFIXES)}), Parquet (.parquet), or a folder of images"
ROWS_IN_MEMORY = 64
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Input:
    """A file or folder of rows.

    A JSON-lines file has one row per line, such as :data:`~sparsight.batch_inference.rows.EXAMPLE`, or ``images`` for
    several. A Parquet file has the same fields as columns, images as bytes or as ``{"bytes": ...}``. In a folder every
    image file at any depth is a row, except hidden ones, and its id is its path.

    Args:
        path: the file or folder.
        prompt: used for rows without one.
        keep: fields that are copied into the results.
        name: what messages call the input; its path if None.
        folder: where relative paths of images start; the file's folder if None.
    """

    path: Path
    prompt: str | None = None
    keep: tuple[str, ...] = ()
    name: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return self.name or printable(str(self.path))

    def rows(self) -> Iterator[Row]:
        """All rows, in order.

        Raises:
            ValueError: the input cannot be read, has an unknown format, or lacks a column, or a folder has no prompt.
        """
        return self._read(self._parquet_rows)

    def _read(self, parquet_rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        if URL.match(str(self.path)):
            raise ValueError(f"{self} is a URL, which is not opened. {TAKEN}.")
        try:
            if self.path.is_dir():
                yield from self._folder_rows()
            elif self.path.suffix.lower() == ".parquet":
                yield from parquet_rows()
            elif self.path.suffix.lower() in ("", *JSON_SUFFIXES) or not self.path.exists():
                yield from self._json_rows()
            else:
                raise ValueError(f"{self} has the unknown suffix {quoted(self.path.suffix)}. {TAKEN}.")
        except OSError as error:
            raise ValueError(f"Cannot read {self}: {printable(error.strerror or str(error)).rstrip('.')}.") from error

    def scan(self) -> dict[RowKey, int | None]:
        """The keys of all rows in order, with the checksums of their prompts; images are not read.

        Raises:
            ValueError: as :meth:`rows`, or there is no row, two rows have the same id, or no row has a field to keep.
        """
        prompts: dict[RowKey, int | None] = {}
        unknown = set(self.keep)
        for row in self._read(self._parquet_prompts):
            if row.key in prompts:
                first = next(each for each in self._read(self._parquet_prompts) if each.key == row.key)
                raise duplicate(first, row)
            prompts[row.key] = row.checksum
            unknown -= set(row.fields)
        if not prompts:
            content = "is empty" if self.path.is_file() and not self.path.stat().st_size else "has no rows"
            raise ValueError(f"{self} {content}. {TAKEN}.")
        # The columns of a Parquet file have been checked.
        if unknown and self.path.suffix.lower() != ".parquet":
            raise ValueError(f"No row of {self} has the field {quoted(min(unknown))}, which is to be kept.")
        return prompts

    def _json_rows(self) -> Iterator[Row]:
        folder = self.path.parent if self.folder is None else self.folder
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    try:
                        values = _parse_json(text)
                    except ValueError as error:
                        yield Row(None, malformed=f"Line {number} {error}.", number=number)
                    else:
                        yield parse_row(values, ("Line", number), folder, self.prompt, self.keep)

    def _folder_rows(self) -> Iterator[Row]:
        if self.prompt is None:
            raise ValueError(f"{self} is a folder of images, which needs a prompt.")
        suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
        number = 0
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            # macOS writes ._page.png, which is not an image, beside page.png on foreign file systems.
            is_hidden = any(part.startswith(".") for part in relative.parts)
            if path.suffix.lower() in suffixes and not is_hidden and not path.is_dir():
                number += 1
                yield parse_row({"id": relative.as_posix(), "image": path}, ("Image", number), Path(), self.prompt)

    def _parquet_rows(self) -> Iterator[Row]:
        for number, values in self._parquet_records("id", "image", "images", "prompt", *self.keep):
            yield parse_row(values, ("Row", number), self.path.parent, self.prompt, self.keep)

    def _parquet_prompts(self) -> Iterator[Row]:
        """Rows with ids and prompts alone; the columns of images, which are large, are not read."""
        for number, values in self._parquet_records("id", "prompt"):
            yield parse_row({**values, "image": b"not read"}, ("Row", number), Path(), self.prompt)

    def _parquet_records(self, *columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The values of some columns, row by row, with the row's number."""
        reader = parquet()
        import pyarrow

        try:
            file = reader.ParquetFile(self.path)
            types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            for name in ("id", *self.keep):
                if name not in types:
                    raise ValueError(f"{self} has no column {quoted(name)}, only {printable(', '.join(types))}.")
            for name in self.keep:
                _check_kept(name, types[name])
            batches = file.iter_batches(
                ROWS_IN_MEMORY, columns=[name for name in dict.fromkeys(columns) if name in types]
            )
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{self} is not a Parquet file, or damaged: {printable(str(error)).rstrip('.')}."
            ) from error


def _check_kept(name: str, kind: Any) -> None:
    """Raise ValueError if JSON cannot hold a column's values."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    plain = (types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    if not any(matches(kind) for matches in (*plain, types.is_null)):
        raise ValueError(
            f"The column {quoted(name)} cannot be kept, because it holds {kind}: "
            "texts, numbers, true and false, and lists of them can."
        )


def _parse_json(line: bytes) -> Any:
    """The value of a line of JSON.

    Raises:
        ValueError: the rest of a sentence that says what is wrong with the line.
    """
    try:
        # Without the line break, after which the decoder counts a second line.
        text = line.decode().rstrip()
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8, see its byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        hint = "" if text.lstrip().startswith("{") else f"; a row is an object such as {EXAMPLE}. {TAKEN}"
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}{hint}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError("has an integer of too many digits") from error


@contextmanager
def open_input(path: Path, prompt: str | None, keep: tuple[str, ...] = ()) -> Iterator[Input]:
    """An input by its path; ``-`` is standard input.

    Rows are read twice, the first time to check them all before the model is loaded. So a stream, which holds JSON
    lines, is copied to a temporary file; its paths of images start at the current folder.

    Raises:
        ValueError: the stream cannot be read, or the path is a device, which may never end.
    """
    if path.is_block_device() or path.is_char_device():
        raise ValueError(f"{printable(path)} is a device. {TAKEN}; - is standard input.")
    if str(path) != "-" and not path.is_fifo():
        yield Input(path, prompt, keep)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "rows.jsonl"
        try:
            with open(copy, "wb") as file:
                if str(path) == "-":
                    shutil.copyfileobj(sys.stdin.buffer, file)
                else:
                    with open(path, "rb") as stream:
                        shutil.copyfileobj(stream, file)
        except OSError as error:
            raise ValueError(f"Cannot read {quoted(str(path))}: {error.strerror}.") from error
        yield Input(copy, prompt, keep, "standard input" if str(path) == "-" else str(path), Path())
