"""What is asked, from every kind of input."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sparsight.batch_inference.rows import Row, checksum, parse_row, read_ids, read_rows


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_json_lines_with_one_picture_or_several(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "asked.jsonl",
        {"id": "a", "image": "a.png", "prompt": "What?"},
        "",
        {"id": 7, "images": ["a.png", "/b.png"], "prompt": "Which?"},
        {"id": "c", "image": "sub/c.png"},
    )
    assert list(read_rows(source, "Why?")) == [
        Row("a", (tmp_path / "a.png",), "What?"),
        Row("7", (tmp_path / "a.png", Path("/b.png")), "Which?"),
        Row("c", (tmp_path / "sub/c.png",), "Why?"),
    ]
    assert list(read_ids(source, "Why?")) == ["a", "7", "c"]


@pytest.mark.parametrize(
    ("row", "name", "complaint"),
    [
        ("hello", "line 1", "Line 1 is not an object such as"),
        ("[1]", "line 1", "Line 1 is not an object such as"),
        ('{"image": "a.png", "prompt": "x"}', "line 1", "Line 1 has no 'id'"),
        ('{"id": 1.5, "image": "a.png", "prompt": "x"}', "line 1", "Line 1 has no 'id'"),
        ('{"id": "a", "prompt": "x"}', "a", "Row 'a' has no 'image' or 'images'"),
        ('{"id": "a", "images": [], "prompt": "x"}', "a", "Row 'a' has no 'image' or 'images'"),
        ('{"id": "a", "image": 3, "prompt": "x"}', "a", "Row 'a' has no 'image' or 'images'"),
        ('{"id": "a", "image": "a.png"}', "a", "Row 'a' has no 'prompt', and none was given"),
        ('{"id": "a", "image": "a.png", "prompt": 5}', "a", "Row 'a' has no 'prompt'"),
    ],
)
def test_a_malformed_row_says_so_and_keeps_its_place(tmp_path: Path, row: str, name: str, complaint: str) -> None:
    (found,) = read_rows(lines(tmp_path / "asked.jsonl", row), None)
    assert found.id == name
    assert found.malformed.startswith(complaint)
    assert found.malformed.endswith(".")


def test_a_folder_is_its_pictures_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", "notes.txt", "deep/asked.jsonl"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    names = ["a.jpg", "b.PNG", "deep/er/c.webp"]
    assert list(read_rows(tmp_path, "What?")) == [Row(name, (tmp_path / name,), "What?") for name in names]
    assert read_ids(tmp_path, "What?") == dict.fromkeys(names, checksum("What?"))


def test_parquet_holds_bytes_alone_or_as_data_sets_have_them(tmp_path: Path) -> None:
    source = tmp_path / "asked.parquet"
    table = {
        "id": [1, 2, None],
        "image": [{"bytes": b"one", "path": None}, {"bytes": None, "path": "two.png"}, {"bytes": b"3", "path": None}],
        "prompt": ["What?", None, "Who?"],
        "more": [1, 2, 3],
    }
    parquet.write_table(pyarrow.table(table), source)
    found = list(read_rows(source, "Why?"))
    assert found[:2] == [Row("1", (b"one",), "What?"), Row("2", (tmp_path / "two.png",), "Why?")]
    assert found[2].malformed == "Row 3 has no 'id', a string or an integer."
    assert read_ids(source, "Why?") == {row.id: checksum(row.prompt or "Who?") for row in found}
    parquet.write_table(pyarrow.table({"id": ["a"], "images": [[b"one", b"two"]]}), source)
    assert list(read_rows(source, "Why?")) == [Row("a", (b"one", b"two"), "Why?")]


def test_a_mapping_is_a_row() -> None:
    given = {"id": "a", "image": b"bytes", "prompt": "What?"}
    assert parse_row(given, "row 1", Path(), None) == Row("a", (b"bytes",), "What?")


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read .*nothing\.jsonl: No such file or directory\.$"):
        read_ids(tmp_path / "nothing.jsonl", None)
    with pytest.raises(ValueError, match=r"Cannot read .*nothing\.parquet: "):
        read_ids(tmp_path / "nothing.parquet", None)
    with pytest.raises(ValueError, match=r"asked\.jsonl has no rows\.$"):
        read_ids(lines(tmp_path / "asked.jsonl"), None)
    with pytest.raises(ValueError, match=r"has no rows\.$"):
        read_ids(tmp_path, "What?")
    with pytest.raises(ValueError, match="needs a prompt"):
        read_ids(tmp_path, None)
    row = {"id": "a", "image": "a.png", "prompt": "x"}
    with pytest.raises(ValueError, match="Two rows have the id 'a'"):
        read_ids(lines(tmp_path / "asked.jsonl", row, row), None)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.parquet is not a Parquet file\.$"):
        read_ids(tmp_path / "text.parquet", None)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="it is not text"):
        read_ids(tmp_path / "bytes.jsonl", None)
    parquet.write_table(pyarrow.table({"name": ["a"]}), tmp_path / "named.parquet")
    with pytest.raises(ValueError, match="has no column 'id', only name"):
        read_ids(tmp_path / "named.parquet", None)
