"""Results on disk: every row once, whatever happened in between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from sparsight.offline.results import Output, Result

ANSWERED = Result("a", "yes", "stop", 10, 2, 3.5, 100, 1000, 0.25)
FAILED = Result("b", error="There is none.", error_kind="unreadable file")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out.jsonl", "sub/out.json", "out.parquet"])
def test_a_finished_run_holds_every_result(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    output = Output(path)
    assert output.append([ANSWERED, FAILED]) == [ANSWERED, FAILED]
    assert ("a" in output, "c" in output, output.results, output.errors) == (True, False, 2, {"unreadable file": 1})
    output.close(finished=True)
    assert names(path.parent)[:1] == [path.name]
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[1] == {"id": "b", "error": "There is none.", "error_kind": "unreadable file"}
    assert [Result(**row) for row in rows] == [ANSWERED, FAILED]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_stopped_run_goes_on_and_no_row_is_written_twice(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    output = Output(path)
    output.append([FAILED])
    output.close(finished=False)
    lines = tmp_path / ("out.parquet.jsonl" if path.suffix == ".parquet" else name)
    lines.write_text(lines.read_text() + '{"id": "a", "te')
    output = Output(path)
    assert (output.results, output.errors) == (1, {"unreadable file": 1})
    assert output.append([FAILED, ANSWERED]) == [ANSWERED]
    output.close(finished=True)
    again = Output(path)
    assert again.results == 2
    assert again.append([ANSWERED, FAILED, Result("c", "no")]) == [Result("c", "no")]
    again.close(finished=True)
    assert names(tmp_path) == [name]
    assert Output(path).results == 3


def test_a_run_that_was_killed_between_writing_parquet_and_clearing_up(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    output = Output(path)
    output.append([ANSWERED, FAILED])
    kept = (tmp_path / "out.parquet.jsonl").read_bytes()
    output.close(finished=True)
    (tmp_path / "out.parquet.jsonl").write_bytes(kept)
    (tmp_path / "out.parquet.tmp").write_bytes(b"half")
    output = Output(path)
    assert (output.results, output.errors) == (2, {"unreadable file": 1})
    output.close(finished=True)
    assert parquet.read_table(path)["id"].to_pylist() == ["a", "b"]
    assert names(tmp_path) == ["out.parquet"]


@pytest.mark.parametrize(
    "content", ["hello\n", "[1]\n", '{"text": "x"}\n', '{"id": "a", "image": "a.png"}\n', "\xff\n"]
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="holds something that is no results: name another file"):
        Output(path)
    assert path.read_text(encoding="latin-1") == content


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Cannot write .*out\.jsonl: File exists\.$"):
        Output(tmp_path / "file" / "out.jsonl")
    with pytest.raises(ValueError, match=r"Cannot write .*: Is a directory\.$"):
        Output(tmp_path)


def test_two_runs_do_not_write_the_same_file(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.jsonl")
    script = (
        "import sys; from pathlib import Path; from sparsight.offline.results import Output; Output(Path(sys.argv[1]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out.jsonl"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"ValueError: Another run is writing {tmp_path / 'out.jsonl'}." in other.stderr
    output.close(finished=True)
