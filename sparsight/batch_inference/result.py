"""The result of a row."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsight.batch_inference.rows import RowKey, row_key


@dataclass(frozen=True)
class Result:
    """The answer to a row, or why there is none.

    Args:
        id: id of the row, of the type that it has in the input; None if the row has no valid id.
        prompt_checksum: CRC-32 of the prompt, by which a continued run knows that the prompt is the same.
        text: the answer without special tokens.
        finish_reason: ``stop`` where the model ended the answer, ``length`` where it reached the longest length.
        prompt_tokens: tokens of the prompt.
        tokens: tokens of the answer, the end-of-sequence token included.
        kept: entries kept of the prompt, mean over layers and KV heads.
        kv_bytes: size of the sequence's cache after compression, spare capacity included.
        full_kv_bytes: size of the full cache of the prompt.
        seconds: the row's share of the time that the model worked: each step's is divided by the rows in the engine.
        error: why there is no answer, in one sentence.
        error_kind: short reason, the same for all rows that fail this way.
        row: line of a JSON-lines file or row of a Parquet file, counted from 1, if there is no id.
        fields: further fields of the input that were kept.
    """

    id: str | int | None
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
    row: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> RowKey:
        """What identifies the row."""
        return row_key(self.id, self.row)

    def record(self) -> dict[str, Any]:
        """The fields that have a value, as plain data; those of the input follow the id."""
        values = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        return {name: values.pop(name) for name in ("id", "row") if name in values} | dict(self.fields) | values

    @classmethod
    def from_record(cls, record: Mapping[str, Any], keep: Iterable[str]) -> "Result":
        """The result of a record.

        Raises:
            KeyError, TypeError, ValueError: it is not the record of a result.
        """
        keep = set(keep)
        values = {name: value for name, value in record.items() if name not in keep}
        result = cls(values.pop("id", None), **values, fields={name: record[name] for name in keep & record.keys()})
        if not isinstance(result.key, str | int | tuple):
            raise TypeError("An id is a string or an integer.")
        return result


NAMES = tuple(each.name for each in dataclasses.fields(Result) if each.name != "fields")
"""Names that records have beside the kept ones."""


def check_keep(keep: Iterable[str]) -> None:
    """Raise ValueError if a field of the input cannot be kept, because results have a field of the same name."""
    for name in keep:
        if name in NAMES or name == "fields":
            raise ValueError(f"The field {name!r} cannot be kept: results have a field of that name.")
