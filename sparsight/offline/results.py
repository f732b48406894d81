"""What became of each row, on disk as soon as it is known."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, get_args, get_type_hints

from sparsight.jsonl import append, recover
from sparsight.offline.parquet import parquet

WRITTEN_ROWS = 4096
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Result:
    """The answer to a row, or why there is none.

    Args:
        id: the row's.
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

    Parquet cannot be appended to: results are JSON lines beside it until :meth:`close`.

    Args:
        path: the file; made if it does not exist.

    Attributes:
        results: how many results there are.
        errors: how many of them are errors, by kind.

    Raises:
        ValueError: the file cannot be written, holds something else, or another run is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_parquet = path.suffix.lower() == ".parquet"
        self._lines = path.with_name(path.name + ".jsonl") if self._is_parquet else path
        self._ids: set[str] = set()
        self.errors: dict[str, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._lines, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"Cannot write {path}: {error.strerror}.") from error
        _lock(self._file, path)
        try:
            for record in self._records():
                self._count(Result(**record))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds something that is no results: name another file.") from error
        # Such a lock is gone when the process closes the file, if only for reading.
        _lock(self._file, path)

    def __contains__(self, row: str) -> bool:
        return row in self._ids

    @property
    def results(self) -> int:
        """How many results there are."""
        return len(self._ids)

    def append(self, results: Iterable[Result]) -> list[Result]:
        """Put on disk those whose rows have no result yet, and return them."""
        new = [result for result in results if result.id not in self._ids]
        append(self._file, [result.record() for result in new])
        for result in new:
            self._count(result)
        return new

    def close(self, *, finished: bool) -> None:
        """Close the file; Parquet is written when the run is finished."""
        if finished and self._is_parquet:
            temporary = self.path.with_name(self.path.name + ".tmp")
            _write_parquet(temporary, self._records())
            temporary.replace(self.path)
            self._lines.unlink()
        self._file.close()

    def _records(self) -> Iterator[dict[str, Any]]:
        """What is on disk, every row once."""
        there = _read_parquet(self.path) if self._is_parquet and self.path.exists() else ()
        seen = set()
        for record in chain(there, recover(self._lines)):
            if record["id"] not in seen:
                seen.add(record["id"])
                yield record

    def _count(self, result: Result) -> None:
        self._ids.add(result.id)
        if result.error_kind is not None:
            self.errors[result.error_kind] = self.errors.get(result.error_kind, 0) + 1


def _lock(file: TextIO, path: Path) -> None:
    """Keep others from writing the file until this process ends.

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
