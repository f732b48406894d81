"""Every kind of input, and inputs that are none."""

import io
import json
import os
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sparsight.batch_inference.input import Input, open_input
from sparsight.batch_inference.rows import Row, checksum


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_json_lines_with_one_image_or_several(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "asked.jsonl",
        {"id": "a", "image": "a.png", "prompt": "What?"},
        "",
        {"id": 7, "images": ["a.png", "/b.png"], "prompt": "Which?", "label": "x"},
        {"id": "7", "image": "sub/c.png"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    source = Input(path, "Why?", ("label",))
    assert list(source.rows()) == [
        Row("a", (tmp_path / "a.png",), "What?"),
        Row(7, (tmp_path / "a.png", Path("/b.png")), "Which?", fields={"label": "x"}),
        Row("7", (tmp_path / "sub/c.png",), "Why?"),
    ]
    assert source.scan() == {"a": checksum("What?"), 7: checksum("Which?"), "7": checksum("Why?")}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"[1]", "Line 2 is not an object such as"),
        (b'{"image": "a.png", "prompt": "x"}', "Line 2 has no 'id'"),
        (b'{"id": "a",}', "Line 2 is not JSON: Expecting property name enclosed in double quotes at column 12."),
        (b'{"id":', "Line 2 is not JSON: Expecting value at column 7."),
        (b"a,a.png,What?", "Line 2 is not JSON: Expecting value at column 1; a row is an object such as {"),
        (
            b"a,a.png,What?",
            "The input is JSON lines (.jsonl, .ndjson, .json), Parquet (.parquet), or a folder of images.",
        ),
        (b'{"id": "a\xff"}', "Line 2 is not UTF-8, see its byte 10."),
        (b"[" * 200_000, "Line 2 is nested too deeply."),
        (b'{"id": ' + b"1" * 5000 + b"}", "Line 2 has an integer of too many digits."),
    ],
)
def test_a_malformed_line_says_what_is_wrong_and_the_others_are_read(
    tmp_path: Path, line: bytes, complaint: str
) -> None:
    path = tmp_path / "asked.jsonl"
    good = b'{"id": "good", "image": "a.png", "prompt": "x"}\n'
    path.write_bytes(good + line + b"\n" + good.replace(b"good", b"last"))
    first, bad, last = Input(path).rows()
    assert (first.id, last.id, last.malformed) == ("good", "last", "")
    assert (bad.id, bad.number) == (None, 2)
    assert complaint in bad.malformed
    assert bad.malformed.endswith(".")
    assert list(Input(path).scan()) == ["good", (2,), "last"]


def test_a_folder_is_its_images_at_any_depth_without_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    hidden = ("._a.jpg", ".b.png", "deep/._c.webp", ".git/d.png")
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", "notes.txt", "deep/asked.jsonl", *hidden):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    names = ["a.jpg", "b.PNG", "deep/er/c.webp"]
    assert list(Input(tmp_path, "What?").rows()) == [Row(name, (tmp_path / name,), "What?") for name in names]
    assert Input(tmp_path, "What?").scan() == dict.fromkeys(names, checksum("What?"))


def test_parquet_holds_bytes_alone_or_as_data_sets_have_them(tmp_path: Path) -> None:
    path = tmp_path / "asked.parquet"
    table = {
        "id": [1, 2, None],
        "image": [{"bytes": b"one", "path": None}, {"bytes": None, "path": "two.png"}, {"bytes": b"3", "path": None}],
        "prompt": ["What?", None, "Who?"],
        "more": [1, 2, 3],
    }
    parquet.write_table(pyarrow.table(table), path)
    source = Input(path, "Why?", ("more",))
    rows = list(source.rows())
    assert rows[:2] == [
        Row(1, (b"one",), "What?", fields={"more": 1}),
        Row(2, (tmp_path / "two.png",), "Why?", fields={"more": 2}),
    ]
    assert (rows[2].key, rows[2].malformed) == ((3,), "Row 3 has no 'id', a string or an integer.")
    assert source.scan() == {1: checksum("What?"), 2: checksum("Why?"), (3,): None}
    parquet.write_table(pyarrow.table({"id": ["a"], "images": [[b"one", b"two"]]}), path)
    assert list(Input(path, "Why?").rows()) == [Row("a", (b"one", b"two"), "Why?")]


def test_float_ids_of_parquet_are_malformed_rows(tmp_path: Path) -> None:
    path = tmp_path / "asked.parquet"
    parquet.write_table(pyarrow.table({"id": [1.0, None, 3.0], "image": [b"a", b"b", b"c"]}), path)
    rows = list(Input(path, "Why?").rows())
    assert [row.key for row in rows] == [(1,), (2,), (3,)] == list(Input(path, "Why?").scan())
    assert rows[0].malformed.startswith("Row 1 has the id 1.0, a float; ids are strings or integers (pandas")


def test_columns_that_json_cannot_hold_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "asked.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "image": [b"a"], "tags": [["x"]]}), path)
    (row,) = Input(path, "Why?", ("tags",)).rows()
    assert row.fields == {"tags": ["x"]}
    with pytest.raises(ValueError, match="The column 'image' cannot be kept, because it holds binary: texts, numbers"):
        Input(path, "Why?", ("image",)).scan()
    with pytest.raises(ValueError, match=r"has no column 'lable', only id, image, tags\.$"):
        Input(path, "Why?", ("lable",)).scan()
    with pytest.raises(ValueError, match=r"No row of .* has the field 'lable', which is to be kept\.$"):
        Input(lines(tmp_path / "asked.jsonl", {"id": 1, "image": "a.png"}), "Why?", ("lable",)).scan()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nothing.jsonl", None, "Cannot read {path}: No such file or directory."),
        ("nothing.parquet", None, "Cannot read {path}: "),
        ("nothing", None, "Cannot read {path}: No such file or directory."),
        ("empty.jsonl", b"", "{path} is empty. The input is JSON lines"),
        ("blank.jsonl", b"\n\n", "{path} has no rows. The input is JSON lines"),
        ("rows.csv", b"id,image\n", "{path} has the unknown suffix '.csv'. The input is JSON lines (.jsonl, "),
        ("page.png", b"\x89PNG", "{path} has the unknown suffix '.png'. The input is"),
        ("text.parquet", b"hello", "{path} is not a Parquet file, or damaged: "),
        (
            "twice.jsonl",
            b'{"id": 1}\n\n{"id": "a"}\n{"id": 1}\n',
            "Line 1 and line 4 have the id 1: ids must be unique.",
        ),
    ],
)
def test_files_that_are_no_input(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(sentence.format(path=path))):
        Input(path).scan()


def test_rows_of_a_table_with_the_same_id_are_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": [7, 8, 7], "image": [b"x"] * 3}), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"^Row 1 and row 3 have the id 7: ids must be unique\.$"):
        Input(tmp_path / "twice.parquet", "Why?").scan()


def test_folders_and_addresses_that_are_no_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no rows\."):
        Input(tmp_path, "What?").scan()
    with pytest.raises(ValueError, match="is a folder of images, which needs a prompt"):
        Input(tmp_path).scan()
    with pytest.raises(ValueError, match=r"^https:/example\.org/a\.jsonl is a URL, which is not opened\. The input is"):
        Input(Path("https://example.org/a.jsonl")).scan()
    parquet.write_table(pyarrow.table({"name": ["a"]}), tmp_path / "named.parquet")
    with pytest.raises(ValueError, match="has no column 'id', only name"):
        Input(tmp_path / "named.parquet").scan()


def test_streams_are_read_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = b'{"id": 1, "image": "a.png"}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(line)))
    with open_input(Path("-"), "What?") as source:
        assert list(source.scan()) == [1]
        assert list(source.rows()) == [Row(1, (Path("a.png"),), "What?")]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(line,))
    writer.start()
    with open_input(pipe, "What?") as source:
        assert list(source.scan()) == [1]
        assert list(source.rows()) == [Row(1, (Path("a.png"),), "What?")]
    writer.join()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    with open_input(Path("-"), "What?") as source, pytest.raises(ValueError, match=r"^standard input is empty\."):
        source.scan()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
def test_a_device_is_not_copied() -> None:
    with (
        pytest.raises(ValueError, match=r"^/dev/zero is a device\. The input is JSON lines"),
        open_input(Path("/dev/zero"), "What?"),
    ):
        pass


def test_a_damaged_parquet_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "asked.parquet"
    parquet.write_table(pyarrow.table({"id": [f"row {number}" for number in range(1000)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    with pytest.raises(
        ValueError, match=r"(Cannot read .*asked\.parquet|asked\.parquet is not a Parquet file, or damaged): "
    ):
        Input(path, "What?").scan()


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asked.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"^Parquet files need pyarrow: pip install 'sparsight\[batch\]'\.$"):
        Input(tmp_path / "asked.parquet").scan()
