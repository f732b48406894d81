"""Results on disk: every row once, whatever happened in between."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from sparsight.batch_inference.output import Output, Result

ABOUT = {"model": "reader", "budget": 0.1, "score": {"kind": "post-vision"}}
ANSWERED = Result("a", 17, "yes", "stop", 10, 2, 3.5, 100, 1000, 0.25)
FAILED = Result("b", error="There is none.", error_kind="unreadable file")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out.jsonl", "sub/out.json", "out.parquet"])
def test_a_finished_run_holds_every_result(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with Output(path, ABOUT) as output:
        assert output.append([ANSWERED, FAILED]) == [ANSWERED, FAILED]
        assert (output.needs("a", 17), output.needs("c", 17)) == (False, True)
        assert (output.count, output.errors) == (2, {"unreadable file": 1})
        output.finish()
    assert names(path.parent) == sorted([path.name, f"{path.name}.run.json"])
    assert json.loads(path.with_name(f"{path.name}.run.json").read_text()) == ABOUT
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[1] == {"id": "b", "error": "There is none.", "error_kind": "unreadable file"}
    assert [Result(**row) for row in rows] == [ANSWERED, FAILED]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_stopped_run_goes_on_and_no_row_is_written_twice(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with Output(path, ABOUT) as output:
        output.append([FAILED])
    lines = tmp_path / ("out.parquet.jsonl" if path.suffix == ".parquet" else name)
    lines.write_text(lines.read_text() + '{"id": "a", "te')
    with Output(path, ABOUT) as output:
        assert (output.count, output.errors) == (1, {"unreadable file": 1})
        assert output.append([FAILED, ANSWERED]) == [ANSWERED]
        output.finish()
    with Output(path, ABOUT) as output:
        assert output.count == 2
        assert output.append([ANSWERED, FAILED, Result("c", 17, "no")]) == [Result("c", 17, "no")]
        output.finish()
    assert names(tmp_path) == [name, f"{name}.run.json"]
    with Output(path, ABOUT) as output:
        assert output.count == 3


def test_a_run_that_was_killed_between_writing_parquet_and_clearing_up(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with Output(path, ABOUT) as output:
        output.append([ANSWERED, FAILED])
        kept = (tmp_path / "out.parquet.jsonl").read_bytes()
        output.finish()
    (tmp_path / "out.parquet.jsonl").write_bytes(kept)
    (tmp_path / "out.parquet.tmp").write_bytes(b"half")
    with Output(path, ABOUT) as output:
        assert (output.count, output.errors) == (2, {"unreadable file": 1})
        output.finish()
    assert parquet.read_table(path)["id"].to_pylist() == ["a", "b"]
    assert names(tmp_path) == ["out.parquet", "out.parquet.run.json"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"model": "writer"}, 'model "reader", not "writer"'),
        ({"budget": 0.2}, "budget 0.1, not 0.2"),
        ({"score": {"kind": "none"}}, 'score {"kind": "post-vision"}, not {"kind": "none"}'),
    ],
)
def test_results_of_another_run_are_not_gone_on_with(
    tmp_path: Path, name: str, finished: bool, other: dict[str, Any], difference: str
) -> None:
    with Output(tmp_path / name, ABOUT) as output:
        output.append([ANSWERED])
        if finished:
            output.finish()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sentence = (
        f"{name} holds results with {difference}: give the options that it was started with, or name another file."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Output(tmp_path / name, ABOUT | other)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_without_results_is_begun_anew_with_other_options(tmp_path: Path) -> None:
    path, run = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    # Killed before the first result: at once, while it said what it is about, while it wrote a result.
    for said, line in (("", ""), ('{"model": "rea', ""), (json.dumps(ABOUT) + "\n", '{"id": "a", "te')):
        run.write_text(said)
        path.write_text(line)
        with Output(path, ABOUT | {"budget": 0.2}) as output:
            assert output.count == 0
        assert json.loads(run.read_text()) == ABOUT | {"budget": 0.2}
        assert path.read_text() == ""


def test_the_answer_to_another_prompt_is_not_taken_for_this_one(tmp_path: Path) -> None:
    with Output(tmp_path / "out.jsonl", ABOUT) as output:
        output.append([ANSWERED, FAILED])
        assert not output.needs("b", 18)
        with pytest.raises(ValueError, match=r"holds the answer to another prompt for row 'a': give the prompts"):
            output.needs("a", 18)


@pytest.mark.parametrize(
    "content", ["hello\n", "[1]\n", '{"text": "x"}\n', '{"id": "a"}\n', '{"id": "a"}', "{}", "\xff\n"]
)
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str, name: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    with pytest.raises(
        ValueError, match=rf"holds something, but there is no {name}.run.json for it: name another file\.$"
    ):
        Output(path, ABOUT)
    assert names(tmp_path) == [name]
    # As if that file were there, for what reason ever.
    (tmp_path / f"{name}.run.json").write_text(json.dumps(ABOUT) + "\n")
    if path.suffix == ".parquet" or content in ("hello\n", "[1]\n", '{"text": "x"}\n', "\xff\n"):
        with pytest.raises(ValueError, match="holds something other than results: name another file"):
            Output(path, ABOUT)
    assert path.read_text(encoding="latin-1") == content


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Cannot write .*out\.jsonl: (File exists|Not a directory)\.$"):
        Output(tmp_path / "file" / "out.jsonl", ABOUT)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder is a folder: name a file\.$"):
        Output(tmp_path / "folder", ABOUT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path: Path, name: str) -> None:
    with Output(tmp_path / name, ABOUT) as output:
        output.append([FAILED])
        output._file = open("/dev/full", "a")  # noqa: SIM115
        with pytest.raises(ValueError, match=r"Cannot write .*: No space left on device\.$"):
            output.append([ANSWERED])
    with Output(tmp_path / name, ABOUT) as output:
        assert (output.count, output.errors) == (1, {"unreadable file": 1})


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_two_runs_do_not_write_the_same_file(tmp_path: Path, name: str) -> None:
    script = (
        "import sys; from pathlib import Path; from sparsight.batch_inference.output import Output;"
        f"Output(Path(sys.argv[1]), {ABOUT!r})"
    )
    command = [sys.executable, "-c", script, str(tmp_path / name)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begin = partial(subprocess.run, command, env=environment, capture_output=True, text=True, check=False)
    with Output(tmp_path / name, ABOUT) as output:
        output.append([ANSWERED])
        assert f"ValueError: Another run is writing {tmp_path / name}." in begin().stderr
        output.finish()
        # Also when its lines beside a Parquet file are gone.
        assert f"ValueError: Another run is writing {tmp_path / name}." in begin().stderr
    assert begin().returncode == 0
