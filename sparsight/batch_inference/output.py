"""What became of each row, on disk as soon as it is known."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO, get_args, get_type_hints

from sparsight.batch_inference.parquet import parquet
from sparsight.utils.jsonl import append, recover

WRITTEN_ROWS = 4096
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Result:
    """The answer to a row, or why there is none.

    Args:
        id: the row's.
        prompt_checksum: CRC-32 of its prompt, by which a run that goes on knows that the prompt is the same.
        text: the answer without special tokens.
        finish_reason: ``stop`` where the model ended the answer, ``length`` where it was as long as it may be.
        prompt_tokens: tokens of the prompt.
        tokens: tokens of the answer, the one that ends it included.
        kept: entries kept of the prompt, a mean over layers and KV heads.
        kv_bytes: bytes of the row's cache after compression, room to grow included.
        full_kv_bytes: bytes that the full cache would take for the prompt.
        seconds: the row's prefill, and its share of the time in which its batch was decoded.
        error: why there is no answer, in one sentence.
        error_kind: the same in a few words that other rows have in common.
    """

    id: str
    prompt_checksum: int | None = None
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    kept: float | None = None
    kv_bytes: int | None = None
    full_kv_bytes: int | None = None
    seconds: float | None = None
    error: str | None = None
    error_kind: str | None = None

    def record(self) -> dict[str, Any]:
        """What there is to say, as plain data."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Output:
    """A file of results that a stopped run goes on with: JSON lines, or Parquet where it is called ``.parquet``.

    Parquet cannot be appended to: results are JSON lines beside it until :meth:`finish`. What all results have in
    common is beside the file in ``<name>.run.json``, so that no run goes on with the results of another.

    Args:
        path: the file; made if it does not exist.
        about: what all results have in common, as JSON has it.

    Attributes:
        results: how many results there are.
        errors: how many of them are errors, by kind.

    Raises:
        ValueError: the file cannot be written, holds something else or results of another run, or is being written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._is_parquet = path.suffix.lower() == ".parquet"
        self._lines = path.with_name(path.name + ".jsonl") if self._is_parquet else path
        self._run = path.with_name(path.name + ".run.json")
        self._asked: dict[str, int | None] = {}
        self.errors: dict[str, int] = {}
        self._file: TextIO | None = None
        try:
            self._open(about)
        except OSError as error:
            raise ValueError(f"Cannot write {path}: {error.strerror}.") from error

    def _open(self, about: Mapping[str, Any]) -> None:
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder: name a file.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What is not ours is left alone, and nothing is put beside it.
        if not self._run.exists():
            self._check_empty()
        self._claim = open(self._run, "a+", encoding="utf-8")  # noqa: SIM115, it stays open: it is the lock
        _lock(self._claim, self.path)
        self._claim.seek(0)
        text = self._claim.read()
        # It is cut short where a run was killed before it had results.
        if not text.endswith("\n"):
            self._check_empty()
        try:
            there = json.loads(text) if text.endswith("\n") else {}
            for record in self._records():
                self._count(Result(**record))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} holds something that is no results: name another file.") from error
        if self._asked:
            self._check_same(there, about)
        else:
            self._claim.truncate(0)
            append(self._claim, [about])

    def _check_empty(self) -> None:
        """Raise ValueError if there is anything in the file already."""
        if any(file.exists() and file.stat().st_size for file in (self.path, self._lines)):
            raise ValueError(f"{self.path} holds something, but no {self._run.name} says what: name another file.")

    def _check_same(self, there: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Raise ValueError unless the results that are there have in common what the new ones will have."""
        for name, value in about.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{self.path} holds results with {name} {_short(there.get(name))}, not {_short(value)}: "
                    "give the options that it was begun with, or name another file."
                )

    def lacks(self, row: str, asked: int | None) -> bool:
        """Whether a row has no result yet; ``asked`` is its prompt's checksum.

        Raises:
            ValueError: it has the result of another prompt.
        """
        if row not in self._asked:
            return True
        # None where the row was no question.
        if self._asked[row] not in (None, asked):
            raise ValueError(
                f"{self.path} holds the answer to another prompt for row {row!r}: "
                "give the prompts that it was begun with, or name another file."
            )
        return False

    @property
    def results(self) -> int:
        """How many results there are."""
        return len(self._asked)

    def append(self, results: Iterable[Result]) -> list[Result]:
        """Put on disk those whose rows have no result yet, and return them.

        Raises:
            ValueError: they cannot be written.
        """
        new = [result for result in results if result.id not in self._asked]
        try:
            if self._file is None:
                self._file = open(self._lines, "a", encoding="utf-8")  # noqa: SIM115, it stays open for the run
            append(self._file, [result.record() for result in new])
        except OSError as error:
            raise ValueError(f"Cannot write {self.path}: {error.strerror}.") from error
        for result in new:
            self._count(result)
        return new

    def finish(self) -> None:
        """Write the Parquet file, if it is one, from the JSON lines beside it.

        Raises:
            ValueError: it cannot be written; the results are still beside it.
        """
        if not self._is_parquet or not self._lines.exists():
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            _write_parquet(temporary, self._records())
            temporary.replace(self.path)
            _sync_folder(self.path.parent)
            self._lines.unlink()
        except OSError as error:
            raise ValueError(f"Cannot write {self.path}: {error.strerror}.") from error

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: object) -> None:
        # What could not be written on a full disk is tried again, and has been said.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._claim.close()

    def _records(self) -> Iterator[dict[str, Any]]:
        """What is on disk, every row once."""
        there = _read_parquet(self.path) if self._is_parquet and self.path.exists() else ()
        seen = set()
        for record in chain(there, recover(self._lines)):
            if record["id"] not in seen:
                seen.add(record["id"])
                yield record

    def _count(self, result: Result) -> None:
        self._asked[result.id] = result.prompt_checksum
        if result.error_kind is not None:
            self.errors[result.error_kind] = self.errors.get(result.error_kind, 0) + 1


def _short(value: Any) -> str:
    """A value as JSON, in a sentence's length."""
    text = json.dumps(value)
    # Of a path every part matters.
    return text if isinstance(value, str) else shorten(text, 80)


def _sync_folder(folder: Path) -> None:
    """Return when the folder's names are on disk."""
    # Windows opens no folders.
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)


def _lock(file: TextIO, path: Path) -> None:
    """Keep others from writing ``path`` until ``file`` is closed.

    Raises:
        ValueError: another process does.
    """
    # Windows has no such locks.
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"Another run is writing {path}.") from error


def _schema() -> Any:
    import pyarrow

    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    # The type of a field, or of one that may be None.
    kinds = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(Result).items()}
    return pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()])


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    for batch in parquet().ParquetFile(path).iter_batches(WRITTEN_ROWS):
        yield from batch.to_pylist()


def _write_parquet(path: Path, records: Iterable[dict[str, Any]]) -> None:
    writer, schema = parquet(), _schema()
    import pyarrow

    rest = iter(records)
    with open(path, "wb") as file:
        with writer.ParquetWriter(file, schema) as table:
            while some := list(islice(rest, WRITTEN_ROWS)):
                table.write_table(pyarrow.Table.from_pylist(some, schema))
        file.flush()
        os.fsync(file.fileno())
