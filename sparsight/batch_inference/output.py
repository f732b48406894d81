"""Results on disk: appended as they come, and continued by the next run."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO, get_args, get_type_hints

from sparsight.batch_inference.input import JSON_SUFFIXES
from sparsight.batch_inference.parquet import parquet
from sparsight.batch_inference.result import NAMES, Result
from sparsight.batch_inference.rows import URL, RowKey
from sparsight.utils.jsonl import append, recover
from sparsight.utils.lock import lock
from sparsight.utils.text import printable, quoted

RETRIED_KINDS = ("malformed row", "out of memory")
"""Errors that may have passed by the next run, or cost nothing to find again: their rows are always retried."""

ROWS_IN_MEMORY = 4096
"""Rows of a Parquet file that are in memory at a time."""


class Output:
    """Results of a run; this class keeps none of them but what became of each row.

    Attributes:
        outcomes: by row, the kind of its error, None if it is answered.
    """

    def __init__(self) -> None:
        self.outcomes: dict[RowKey, str | None] = {}
        self._checksums: dict[RowKey, int | None] = {}

    def missing(self, prompts: Mapping[RowKey, int | None]) -> set[RowKey]:
        """Rows without a result, out of rows with the checksums of their prompts.

        Raises:
            ValueError: a row has the answer to another prompt, or the ids cannot be written.
        """
        return {key for key, checksum in prompts.items() if self._needs(key, checksum)}

    def _needs(self, key: RowKey, checksum: int | None) -> bool:
        return key not in self.outcomes

    def append(self, results: Iterable[Result]) -> list[Result]:
        """Write the results of rows that have none yet, and return these results once they are written.

        Raises:
            ValueError: they cannot be written.
        """
        new = [result for result in results if result.key not in self.outcomes]
        self._write([result.record() for result in new])
        for result in new:
            self._register(result)
        return new

    def _write(self, records: list[dict[str, Any]]) -> None:
        """Append records, and return when they are written."""
        raise NotImplementedError

    def _register(self, result: Result) -> None:
        self.outcomes[result.key] = result.error_kind
        self._checksums[result.key] = result.prompt_checksum

    def finish(self) -> None:
        """Complete the output after the last result."""

    def close(self) -> None:
        """Release the output."""

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class StandardOutput(Output):
    """Results as JSON lines on standard output, where no run continues them."""

    def __init__(self) -> None:
        super().__init__()
        # Other code may redirect sys.stdout.
        self._stream = sys.stdout

    def _write(self, records: list[dict[str, Any]]) -> None:
        self._stream.write("".join(json.dumps(record) + "\n" for record in records))
        self._stream.flush()


class OutputFile(Output):
    """A file of results that a stopped run continues: JSON lines, or Parquet if its suffix is ``.parquet``.

    Parquet cannot be appended to, so results are JSON lines in ``<name>.jsonl`` until :meth:`finish`. The settings that
    all results share are in ``<name>.run.json``, so that a run with other settings does not continue the file.

    Args:
        path: the file; created if it does not exist.
        settings: what all results have in common, JSON serializable.
        keep: fields of the input that are copied into the results.
        retry_errors: whether errors are dropped, so that their rows are answered again; those of :data:`RETRIED_KINDS`
            always are.

    Raises:
        ValueError: the file cannot be written, holds something else or results with other settings, or another run is
            writing it.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], keep: Iterable[str] = (), *, retry_errors: bool = False
    ) -> None:
        super().__init__()
        check_output_path(path)
        self.path, self._keep, self._retry_errors = path, tuple(keep), retry_errors
        self._is_parquet = path.suffix.lower() == ".parquet"
        self._lines = path.with_name(path.name + ".jsonl") if self._is_parquet else path
        self._run_path = path.with_name(path.name + ".run.json")
        self._file: TextIO | None = None
        with self._writing():
            self._open({**settings, "keep": list(self._keep)})

    def _open(self, settings: Mapping[str, Any]) -> None:
        if self._is_parquet:
            parquet()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file that is not ours is left alone, and no run file is put beside it.
        if not self._run_path.exists():
            self._check_empty()
        self._run_file = open(self._run_path, "a+", encoding="utf-8")  # noqa: SIM115, stays open: it is the lock
        lock(self._run_file, self.path)
        self._run_file.seek(0)
        text = self._run_file.read()
        # A run that was killed before its first result may have left an incomplete line.
        if not text.endswith("\n"):
            self._check_empty()
        try:
            existing = json.loads(text) if text.endswith("\n") else {}
            dropped = False
            for record in self._records():
                result = Result.from_record(record, existing.get("keep", ()))
                if self._is_retried(result.error_kind):
                    dropped = True
                else:
                    self._register(result)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self} holds something other than results: name another file.") from error
        if self.outcomes:
            self._check_same(existing, settings)
        if dropped:
            self._drop_retried()
        if not self.outcomes:
            self._run_file.truncate(0)
            append(self._run_file, [settings])

    def __str__(self) -> str:
        return printable(str(self.path))

    def _is_retried(self, error_kind: str | None) -> bool:
        return error_kind is not None and (self._retry_errors or error_kind in RETRIED_KINDS)

    def _drop_retried(self) -> None:
        """Remove results that are retried from the JSON lines; a Parquet file is written anew at the end."""
        if not self._lines.exists():
            return
        temporary = self._lines.with_name(self._lines.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            kept = (record for record in recover(self._lines) if not self._is_retried(record.get("error_kind")))
            while chunk := list(islice(kept, ROWS_IN_MEMORY)):
                append(file, chunk)
        temporary.replace(self._lines)
        _sync_folder(self.path.parent)

    def _check_empty(self) -> None:
        """Raise ValueError if there is anything in the file already."""
        if any(file.exists() and file.stat().st_size for file in (self.path, self._lines)):
            raise ValueError(
                f"{self} holds something, but there is no {printable(self._run_path.name)} for it: name another file."
            )

    def _check_same(self, existing: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise ValueError if the existing results have other settings."""
        for name in (*settings, *existing):
            if existing.get(name) != settings.get(name):
                raise ValueError(
                    f"{self} holds results with {name} {_short(existing.get(name))}, not {_short(settings.get(name))}: "
                    "give the options that it was started with, or name another file."
                )

    def missing(self, prompts: Mapping[RowKey, int | None]) -> set[RowKey]:
        """Rows without a result, out of rows with the checksums of their prompts.

        Raises:
            ValueError: a row has the answer to another prompt, or the output is Parquet and ids are of two types.
        """
        if self._is_parquet and len(_id_types(chain(prompts, self.outcomes))) > 1:
            raise ValueError(
                f"{self} cannot be written: some ids are strings and some integers, but a Parquet column has one type; "
                "name a .jsonl file."
            )
        return super().missing(prompts)

    def _needs(self, key: RowKey, checksum: int | None) -> bool:
        if key not in self.outcomes:
            return True
        # None if the row was malformed.
        if self._checksums[key] not in (None, checksum):
            raise ValueError(
                f"{self} holds the answer to another prompt for row {quoted(key)}: "
                "give the prompts that it was started with, or name another file."
            )
        return False

    def _write(self, records: list[dict[str, Any]]) -> None:
        """Append records, and return when they are on disk."""
        with self._writing():
            if self._file is None:
                self._file = open(self._lines, "a", encoding="utf-8")  # noqa: SIM115, stays open for the run
            append(self._file, records)

    def finish(self) -> None:
        """If the output is Parquet, write it from the JSON lines beside it.

        Raises:
            ValueError: it cannot be written; the JSON lines are still there.
        """
        if not self._is_parquet or not self._lines.exists():
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self._writing():
            try:
                _write_parquet(temporary, self._records(), self._schema())
            # pyarrow's errors are of these types.
            except (ValueError, TypeError, OverflowError) as error:
                reason = printable(str(error)).rstrip(".")
                raise ValueError(f"Cannot write {self}, the results are in {self._lines.name}: {reason}.") from error
            temporary.replace(self.path)
            _sync_folder(self.path.parent)
            self._lines.unlink()

    def close(self) -> None:
        """Close the files and release the lock."""
        # Closing writes again what a full disk refused, which has been reported.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._run_file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"Cannot write {self}: {error.strerror or error}.") from error

    def _records(self) -> Iterator[dict[str, Any]]:
        """The results on disk, each row once."""
        if self._is_parquet and self.path.exists():
            # A row that was retried, or a run that was killed while it cleaned up, leaves a row in both files.
            newer = {_identity(record) for record in recover(self._lines)}
            for record in _read_parquet(self.path):
                retried = self._lines.exists() and self._is_retried(record["error_kind"])
                if not retried and _identity(record) not in newer:
                    yield record
        yield from recover(self._lines)

    def _schema(self) -> Any:
        """The Parquet schema: the types of :class:`Result`'s fields, of the ids, and of what was kept."""
        import pyarrow

        types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
        # Without the None of optional fields.
        kinds = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(Result).items()}
        fields = {name: types[kinds[name]] for name in NAMES}
        fields["id"] = types[(_id_types(self.outcomes) or {str}).pop()]
        kept = pyarrow.schema([])
        records = ({name: record.get(name) for name in self._keep} for record in self._records())
        while self._keep and (chunk := list(islice(records, ROWS_IN_MEMORY))):
            schemas = [kept, pyarrow.Table.from_pylist(chunk).schema]
            kept = pyarrow.unify_schemas(schemas, promote_options="permissive")
        after_id = {name: fields.pop(name) for name in ("id", "row")} | {each.name: each.type for each in kept}
        return pyarrow.schema(list((after_id | fields).items()))


def check_output_path(path: Path) -> None:
    """Raise ValueError if results cannot be written to a path, whatever it holds."""
    name = printable(str(path))
    if URL.match(str(path)):
        raise ValueError(f"The output {name} is a URL: name a file.")
    if path.is_dir():
        raise ValueError(f"The output {name} is a folder: name a file.")
    if path.exists() and not path.is_file():
        raise ValueError(f"The output {name} is a device or a pipe: name a file, or - for standard output.")
    if path.suffix.lower() not in (*JSON_SUFFIXES, ".parquet"):
        raise ValueError(
            f"The output {name} needs a suffix for its format: {', '.join(JSON_SUFFIXES)} (JSON lines) or .parquet."
        )


def _identity(record: Mapping[str, Any]) -> tuple[Any, Any]:
    return record.get("id"), record.get("row")


def _id_types(keys: Iterable[RowKey]) -> set[type]:
    """The types of the ids among some keys."""
    return {type(key) for key in keys} - {tuple}


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


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    for batch in parquet().ParquetFile(path).iter_batches(ROWS_IN_MEMORY):
        yield from batch.to_pylist()


def _write_parquet(path: Path, records: Iterator[dict[str, Any]], schema: Any) -> None:
    import pyarrow

    with open(path, "wb") as file:
        with parquet().ParquetWriter(file, schema) as writer:
            while chunk := list(islice(records, ROWS_IN_MEMORY)):
                writer.write_table(pyarrow.Table.from_pylist(chunk, schema))
        file.flush()
        os.fsync(file.fileno())
