"""Results on disk: appended as they come, and continued by the next run."""

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

ROWS_IN_MEMORY = 4096
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Result:
    """The answer to a row, or why there is none.

    Args:
        id: id of the row.
        prompt_checksum: CRC-32 of the prompt, by which a continued run knows that the prompt is the same.
        text: the answer without special tokens.
        finish_reason: ``stop`` where the model ended the answer, ``length`` where it reached the longest length.
        prompt_tokens: tokens of the prompt.
        tokens: tokens of the answer, the end-of-sequence token included.
        kept: entries kept of the prompt, mean over layers and KV heads.
        kv_bytes: size of the sequence's cache after compression, spare capacity included.
        full_kv_bytes: size of the full cache of the prompt.
        seconds: time of the row's prefill, and its share of the time in which its batch was decoded.
        error: why there is no answer, in one sentence.
        error_kind: short reason, the same for all rows that fail this way.
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
        """The fields that have a value, as plain data."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Output:
    """A file of results that a stopped run continues: JSON lines, or Parquet if its suffix is ``.parquet``.

    Parquet cannot be appended to, so results are JSON lines in ``<name>.jsonl`` until :meth:`finish`. The settings that
    all results share are in ``<name>.run.json``, so that a run with other settings does not continue the file.

    Args:
        path: the file; created if it does not exist.
        settings: what all results have in common, JSON serializable.

    Attributes:
        errors: number of results that are errors, by kind.

    Raises:
        ValueError: the file cannot be written, holds something else or results with other settings, or another run is
            writing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._is_parquet = path.suffix.lower() == ".parquet"
        self._lines = path.with_name(path.name + ".jsonl") if self._is_parquet else path
        self._run_path = path.with_name(path.name + ".run.json")
        self._checksums: dict[str, int | None] = {}
        self.errors: dict[str, int] = {}
        self._file: TextIO | None = None
        try:
            self._open(settings)
        except OSError as error:
            raise ValueError(f"Cannot write {path}: {error.strerror}.") from error

    def _open(self, settings: Mapping[str, Any]) -> None:
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder: name a file.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file that is not ours is left alone, and no run file is put beside it.
        if not self._run_path.exists():
            self._check_empty()
        self._run_file = open(self._run_path, "a+", encoding="utf-8")  # noqa: SIM115, stays open: it is the lock
        _lock(self._run_file, self.path)
        self._run_file.seek(0)
        text = self._run_file.read()
        # A run that was killed before its first result may have left an incomplete line.
        if not text.endswith("\n"):
            self._check_empty()
        try:
            existing = json.loads(text) if text.endswith("\n") else {}
            for record in self._records():
                self._register(Result(**record))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} holds something other than results: name another file.") from error
        if self._checksums:
            self._check_same(existing, settings)
        else:
            self._run_file.truncate(0)
            append(self._run_file, [settings])

    def _check_empty(self) -> None:
        """Raise ValueError if there is anything in the file already."""
        if any(file.exists() and file.stat().st_size for file in (self.path, self._lines)):
            raise ValueError(
                f"{self.path} holds something, but there is no {self._run_path.name} for it: name another file."
            )

    def _check_same(self, existing: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise ValueError if the existing results have other settings."""
        for name, value in settings.items():
            if existing.get(name) != value:
                raise ValueError(
                    f"{self.path} holds results with {name} {_short(existing.get(name))}, not {_short(value)}: "
                    "give the options that it was started with, or name another file."
                )

    def needs(self, row: str, checksum: int | None) -> bool:
        """Whether a row has no result yet.

        Raises:
            ValueError: it has the result of a prompt with another checksum.
        """
        if row not in self._checksums:
            return True
        # None if the row was malformed.
        if self._checksums[row] not in (None, checksum):
            raise ValueError(
                f"{self.path} holds the answer to another prompt for row {row!r}: "
                "give the prompts that it was started with, or name another file."
            )
        return False

    @property
    def count(self) -> int:
        """Number of results."""
        return len(self._checksums)

    def append(self, results: Iterable[Result]) -> list[Result]:
        """Write the results of rows that have none yet, and return these results once they are on disk.

        Raises:
            ValueError: they cannot be written.
        """
        new = [result for result in results if result.id not in self._checksums]
        try:
            if self._file is None:
                self._file = open(self._lines, "a", encoding="utf-8")  # noqa: SIM115, stays open for the run
            append(self._file, [result.record() for result in new])
        except OSError as error:
            raise ValueError(f"Cannot write {self.path}: {error.strerror}.") from error
        for result in new:
            self._register(result)
        return new

    def finish(self) -> None:
        """If the output is Parquet, write it from the JSON lines beside it.

        Raises:
            ValueError: it cannot be written; the JSON lines are still there.
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
        # Closing writes again what a full disk refused, which has been reported.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._run_file.close()

    def _records(self) -> Iterator[dict[str, Any]]:
        """The results on disk, each row once."""
        finished = _read_parquet(self.path) if self._is_parquet and self.path.exists() else ()
        seen = set()
        for record in chain(finished, recover(self._lines)):
            if record["id"] not in seen:
                seen.add(record["id"])
                yield record

    def _register(self, result: Result) -> None:
        self._checksums[result.id] = result.prompt_checksum
        if result.error_kind is not None:
            self.errors[result.error_kind] = self.errors.get(result.error_kind, 0) + 1


def _short(value: Any) -> str:
    """A value as JSON, short enough for a message."""
    text = json.dumps(value)
    # A shortened path would be ambiguous.
    return text if isinstance(value, str) else shorten(text, 80)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    # Windows cannot open folders.
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)


def _lock(file: TextIO, path: Path) -> None:
    """Lock ``path`` against other processes until ``file`` is closed.

    Raises:
        ValueError: another process has the lock.
    """
    # Windows has no fcntl.
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"Another run is writing {path}.") from error


def _schema() -> Any:
    import pyarrow

    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    # Without the None of optional fields.
    kinds = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(Result).items()}
    return pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()])


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    for batch in parquet().ParquetFile(path).iter_batches(ROWS_IN_MEMORY):
        yield from batch.to_pylist()


def _write_parquet(path: Path, records: Iterable[dict[str, Any]]) -> None:
    schema = _schema()
    import pyarrow

    remaining = iter(records)
    with open(path, "wb") as file:
        with parquet().ParquetWriter(file, schema) as writer:
            while chunk := list(islice(remaining, ROWS_IN_MEMORY)):
                writer.write_table(pyarrow.Table.from_pylist(chunk, schema))
        file.flush()
        os.fsync(file.fileno())
