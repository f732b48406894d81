import json
from pathlib import Path

import pytest

from sparsight.utils.jsonl import append, recover


def test_appended_values_are_recovered(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(recover(path)) == []
    for lines in ([{"a": 1}], [], [{"text": "two\nlines"}, {"ü": None}]):
        with open(path, "a", encoding="utf-8") as file:
            append(file, lines)
    assert list(recover(path)) == [{"a": 1}, {"text": "two\nlines"}, {"ü": None}]


def test_a_file_of_something_else_is_not_truncated(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(json.JSONDecodeError):
        list(recover(path))
    assert path.read_text() == "hello"


@pytest.mark.parametrize("cut", range(1, 9))
def test_an_incomplete_last_line_is_removed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n'[:-cut])
    assert list(recover(path)) == [{"a": 1}]
    assert path.read_bytes() == b'{"a": 1}\n'
