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

from sparsight.batch_inference.output import OutputFile
from sparsight.batch_inference.result import Result, check_keep

ABOUT = {"model": "reader", "budget": 0.1, "score": {"kind": "post-vision"}}
ANSWERED = Result("a", 17, "yes", "stop", 10, 2, 3.5, 100, 1000, 0.25)
RUN = ABOUT | {"keep": []}
FAILED = Result("b", error="There is none.", error_kind="unreadable file")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out.jsonl", "sub/out.json", "out.parquet"])
def test_a_finished_run_holds_every_result(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with OutputFile(path, ABOUT) as output:
        assert output.append([ANSWERED, FAILED]) == [ANSWERED, FAILED]
        assert output.missing({"a": 17, "c": 17}) == {"c"}
        assert output.outcomes == {"a": None, "b": "unreadable file"}
        output.finish()
    assert names(path.parent) == sorted([path.name, f"{path.name}.run.json"])
    assert json.loads(path.with_name(f"{path.name}.run.json").read_text()) == RUN
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[1] == {"id": "b", "error": "There is none.", "error_kind": "unreadable file"}
    assert [Result(**row) for row in rows] == [ANSWERED, FAILED]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_stopped_run_goes_on_and_no_row_is_written_twice(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with OutputFile(path, ABOUT) as output:
        output.append([FAILED])
    lines = tmp_path / ("out.parquet.jsonl" if path.suffix == ".parquet" else name)
    lines.write_text(lines.read_text() + '{"id": "a", "te')
    with OutputFile(path, ABOUT) as output:
        assert output.outcomes == {"b": "unreadable file"}
        assert output.append([FAILED, ANSWERED]) == [ANSWERED]
        output.finish()
    with OutputFile(path, ABOUT) as output:
        assert output.outcomes == {"a": None, "b": "unreadable file"}
        assert output.append([ANSWERED, FAILED, Result("c", 17, "no")]) == [Result("c", 17, "no")]
        output.finish()
    assert names(tmp_path) == [name, f"{name}.run.json"]
    with OutputFile(path, ABOUT) as output:
        assert output.outcomes == {"a": None, "b": "unreadable file", "c": None}


def test_a_run_that_was_killed_between_writing_parquet_and_clearing_up(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with OutputFile(path, ABOUT) as output:
        output.append([ANSWERED, FAILED])
        kept = (tmp_path / "out.parquet.jsonl").read_bytes()
        output.finish()
    (tmp_path / "out.parquet.jsonl").write_bytes(kept)
    (tmp_path / "out.parquet.tmp").write_bytes(b"half")
    with OutputFile(path, ABOUT) as output:
        assert output.outcomes == {"a": None, "b": "unreadable file"}
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
    with OutputFile(tmp_path / name, ABOUT) as output:
        output.append([ANSWERED])
        if finished:
            output.finish()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sentence = (
        f"{name} holds results with {difference}: give the options that it was started with, or name another file."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        OutputFile(tmp_path / name, ABOUT | other)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_without_results_is_begun_anew_with_other_options(tmp_path: Path) -> None:
    path, run = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    # Killed before the first result: at once, while it said what it is about, while it wrote a result.
    for said, line in (("", ""), ('{"model": "rea', ""), (json.dumps(ABOUT) + "\n", '{"id": "a", "te')):
        run.write_text(said)
        path.write_text(line)
        with OutputFile(path, ABOUT | {"budget": 0.2}) as output:
            assert output.outcomes == {}
        assert json.loads(run.read_text()) == RUN | {"budget": 0.2}
        assert path.read_text() == ""


def test_the_answer_to_another_prompt_is_not_taken_for_this_one(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "out.jsonl", ABOUT) as output:
        output.append([ANSWERED, FAILED])
        assert output.missing({"b": 18}) == set()
        with pytest.raises(ValueError, match=r"holds the answer to another prompt for row 'a': give the prompts"):
            output.missing({"a": 18})


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
        OutputFile(path, ABOUT)
    assert names(tmp_path) == [name]
    # As if that file were there, for what reason ever.
    (tmp_path / f"{name}.run.json").write_text(json.dumps(ABOUT) + "\n")
    if path.suffix == ".parquet" or content in ("hello\n", "[1]\n", '{"text": "x"}\n', "\xff\n"):
        with pytest.raises(ValueError, match="holds something other than results: name another file"):
            OutputFile(path, ABOUT)
    assert path.read_text(encoding="latin-1") == content


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Cannot write .*out\.jsonl: (File exists|Not a directory)\.$"):
        OutputFile(tmp_path / "file" / "out.jsonl", ABOUT)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"The output .*folder is a folder: name a file\.$"):
        OutputFile(tmp_path / "folder", ABOUT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path: Path, name: str) -> None:
    with OutputFile(tmp_path / name, ABOUT) as output:
        output.append([FAILED])
        output._file = open("/dev/full", "a")  # noqa: SIM115
        with pytest.raises(ValueError, match=r"Cannot write .*: No space left on device\.$"):
            output.append([ANSWERED])
    with OutputFile(tmp_path / name, ABOUT) as output:
        assert output.outcomes == {"b": "unreadable file"}


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_two_runs_do_not_write_the_same_file(tmp_path: Path, name: str) -> None:
    script = (
        "import sys; from pathlib import Path; from sparsight.batch_inference.output import OutputFile;"
        f"OutputFile(Path(sys.argv[1]), {ABOUT!r})"
    )
    command = [sys.executable, "-c", script, str(tmp_path / name)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begin = partial(subprocess.run, command, env=environment, capture_output=True, text=True, check=False)
    with OutputFile(tmp_path / name, ABOUT) as output:
        output.append([ANSWERED])
        assert f"ValueError: Another run is writing {tmp_path / name}." in begin().stderr
        output.finish()
        # Also when its lines beside a Parquet file are gone.
        assert f"ValueError: Another run is writing {tmp_path / name}." in begin().stderr
    assert begin().returncode == 0


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("finished", [True, False])
def test_errors_that_pass_are_retried_and_others_on_request(tmp_path: Path, name: str, finished: bool) -> None:
    path = tmp_path / name
    passing = [
        Result("c", 17, error="Full.", error_kind="out of memory"),
        Result(None, row=3, error_kind="malformed row"),
    ]
    with OutputFile(path, ABOUT) as output:
        output.append([ANSWERED, FAILED, *passing])
        if finished:
            output.finish()
    prompts = {"a": 17, "b": 17, "c": 17, (3,): None}
    with OutputFile(path, ABOUT) as output:
        assert output.missing(prompts) == {"c", (3,)}
    with OutputFile(path, ABOUT, retry_errors=True) as output:
        assert output.missing(prompts) == {"b", "c", (3,)}
        # Killed here: an answer is not lost, and neither are the other errors asked for again.
        output.append([Result("c", 17, "yes")])
    with OutputFile(path, ABOUT, retry_errors=True) as output:
        assert output.missing(prompts) == {"b", (3,)}
        output.append([Result("b", 17, "no")])
        output.finish()
    with OutputFile(path, ABOUT) as output:
        assert output.outcomes == {"a": None, "b": None, "c": None}
    assert names(tmp_path) == [name, f"{name}.run.json"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_ids_keep_their_types_and_fields_of_the_input_are_carried(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    results = [
        Result(1, 17, "yes", fields={"label": 7, "tags": ["x"], "note": None}),
        Result(2**62, 17, "no", fields={"label": 2.5, "tags": [], "note": "n"}),
        Result(None, row=3, error="Line 3.", error_kind="malformed row"),
    ]
    for some in (results[:2], results[2:]):
        with OutputFile(path, ABOUT, ("label", "tags", "note")) as output:
            output.append(some)
            output.finish()
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        assert table.schema.names[:5] == ["id", "row", "label", "tags", "note"]
        assert [str(kind) for kind in table.schema.types[:5]] == [
            "int64", "int64", "double", "list<element: string>", "string",
        ]  # fmt: skip
        rows = table.to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[0] == {"id": 1, "label": 7, "tags": ["x"], "note": None, "prompt_checksum": 17, "text": "yes"}
    assert [row.get("id") for row in rows] == [1, 2**62, None]
    assert [type(row.get("id")) for row in rows] == [int, int, type(None)]
    assert [row.get("row") for row in rows] == [None, None, 3]
    assert [row.get("label") for row in rows] == [7, 2.5, None]


def test_a_number_and_its_digits_are_two_ids(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "out.jsonl", ABOUT) as output:
        assert output.append([Result(1, 17, "a"), Result("1", 17, "b")]) == [Result(1, 17, "a"), Result("1", 17, "b")]
    with OutputFile(tmp_path / "out.jsonl", ABOUT) as output:
        assert output.missing({1: 17, "1": 17, 2: 17}) == {2}
    with (
        OutputFile(tmp_path / "out.parquet", ABOUT) as output,
        pytest.raises(ValueError, match=r"out\.parquet cannot be written: some ids are strings and some integers"),
    ):
        output.missing({1: 17, "1": 17})


def test_fields_of_several_types_are_refused_by_parquet_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with OutputFile(path, ABOUT, ["label"]) as output:
        output.append([Result("a", 17, "yes", fields={"label": 7}), Result("b", 17, "no", fields={"label": "seven"})])
        with pytest.raises(ValueError, match=r"Cannot write .*out\.parquet, the results are in out\.parquet\.jsonl: "):
            output.finish()
    assert (tmp_path / "out.parquet.jsonl").read_text().count("\n") == 2


def test_fields_that_results_have_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="The field 'text' cannot be kept: results have a field of that name"):
        check_keep(["label", "text"])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("o.csv", "needs a suffix for its format: .jsonl, .ndjson, .json (JSON lines) or .parquet."),
        ("out", "needs a suffix for its format"),
        ("https://example.org/o.jsonl", "is a URL: name a file."),
        ("/dev/null", "is a device or a pipe: name a file, or - for standard output."),
        (".", "is a folder: name a file."),
    ],
)
def test_paths_that_cannot_be_an_output(path: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        OutputFile(Path(path), ABOUT)
    assert not Path("o.csv").exists()
