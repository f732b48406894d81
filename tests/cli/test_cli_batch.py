"""``sparsight batch``: every kind of input and output, and runs that are killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

Run = Callable[..., tuple[int, str, str]]
TOKENS = 12
COUNT = 7


def prompt_of(number: int) -> str:
    return "What is it" + "?" * (number % 3 * 9 + 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise."""
    folder = tmp_path_factory.mktemp("questions")
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(256, size=(56, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def write_rows(folder: Path, *more: dict[str, Any], count: int = COUNT) -> Path:
    path = folder / f"questions-{count}.jsonl"
    numbers = range(count)
    rows = [{"id": str(each), "image": f"{each % COUNT}.png", "prompt": prompt_of(each)} for each in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return path


@pytest.fixture(scope="session")
def questions(folder: Path) -> Path:
    """A question about each image."""
    return write_rows(folder)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by id, without their times; ids must be unique."""
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
        records = [{name: value for name, value in row.items() if value is not None} for row in rows]
    else:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {record["id"]: {**record, "seconds": None} for record in records}
    assert len(by_id) == len(records)
    return by_id


@pytest.fixture
def options(llava: str) -> tuple[Any, ...]:
    return ("--model", llava, "--max-new-tokens", TOKENS, "--budget", 0.2)


@pytest.fixture
def expected(run: Run, questions: Path, options: tuple[Any, ...], tmp_path: Path) -> dict[str, dict[str, Any]]:
    run("batch", questions, tmp_path / "expected.jsonl", *options, "--json")
    return read(tmp_path / "expected.jsonl")


def test_the_summary_adds_up_the_results(run: Run, questions: Path, options: tuple[Any, ...], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    code, out, err = run("batch", questions, output, *options, "--json")
    summary, records = json.loads(out), read(output).values()
    assert (code, err) == (0, "")
    assert set(read(output)) == {str(number) for number in range(COUNT)}
    assert (summary["rows"], summary["answered"], summary["before"], summary["errors"]) == (COUNT, COUNT, 0, {})
    assert summary["new_tokens"] == sum(record["tokens"] for record in records) == COUNT * TOKENS
    for name in ("kv_bytes", "full_kv_bytes"):
        assert summary[name] == sum(record[name] for record in records)
    assert summary["rows_per_second"] == pytest.approx(COUNT / summary["seconds"])
    assert summary["output"] == str(output)


def test_one_row_answers_as_generate_does(
    run_json: Callable[..., Any], folder: Path, expected: dict[str, dict[str, Any]], options: tuple[Any, ...]
) -> None:
    for number in range(3):
        prompt = ("--image", folder / f"{number}.png", "--prompt", prompt_of(number))
        single = run_json("generate", *prompt, *options)
        result = expected[str(number)]
        assert result["text"] == single["text"]
        assert result["prompt_tokens"] == single["prompt_tokens"]
        assert result["kept"] == pytest.approx(sum(single["kept_per_layer"]) / len(single["kept_per_layer"]))


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("kind", ["folder", "bytes", "data set"])
def test_every_kind_of_input_and_output_gives_the_same_answers(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path, kind: str, name: str
) -> None:
    single = tmp_path / "single.jsonl"
    rows = [{"id": f"{number}.png", "image": str(folder / f"{number}.png")} for number in range(COUNT)]
    single.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = folder
    if kind != "folder":
        source = tmp_path / "questions.parquet"
        pictures: list[Any] = [Path(row["image"]).read_bytes() for row in rows]
        if kind == "data set":
            pictures = [{"bytes": picture, "path": None} for picture in pictures]
        parquet.write_table(pyarrow.table({"id": [row["id"] for row in rows], "image": pictures}), source)
    for given, output in ((single, "expected.jsonl"), (source, name)):
        code, _, err = run("batch", given, tmp_path / output, "--prompt", "What is it?", *options, "--json")
        assert (code, err) == (0, "")
    assert read(tmp_path / name) == read(tmp_path / "expected.jsonl")
    assert len(read(tmp_path / name)) == COUNT


def test_errors_are_counted_by_kind_and_set_the_exit_code(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path
) -> None:
    for number in range(COUNT):
        os.link(folder / f"{number}.png", tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_text("hello")
    wrong = [{"id": name, "image": name, "prompt": "What?"} for name in ("none.png", "no.png", "text.png")]
    source = write_rows(tmp_path, *wrong)
    code, out, _ = run("batch", source, tmp_path / "out.jsonl", *options, "--json")
    kinds = {"unreadable file": 2, "not a picture": 1}
    assert code == 1
    assert json.loads(out)["errors"] == kinds
    assert json.loads(out)["answered"] == COUNT
    # A second run has nothing to do and reports the same errors.
    before = (tmp_path / "out.jsonl").read_bytes()
    code, out, _ = run("batch", source, tmp_path / "out.jsonl", *options, "--json")
    assert (code, json.loads(out)["errors"], json.loads(out)["before"]) == (1, kinds, COUNT + 3)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    code, out, err = run("batch", source, tmp_path / "other.jsonl", *options)
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (1, "")
    assert ["rows", str(COUNT + 3)] in lines
    assert ["answered", str(COUNT)] in lines
    assert ["unreadable", "file", "2"] in lines
    assert ["not", "a", "picture", "1"] in lines


class Killed:
    """A command line run in a process that can be killed."""

    def __init__(self, *arguments: object) -> None:
        self.command = [sys.executable, "-c", "from sparsight.cli import main; main()", *map(str, arguments)]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def start(self) -> "subprocess.Popen[bytes]":
        # Background jobs of a shell ignore Ctrl-C, and the tests may be one.
        reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(self.command, env=self.environment, preexec_fn=reset, start_new_session=True, **pipes)


@pytest.mark.parametrize(("name", "kills"), [("out.jsonl", 10), ("out.parquet", 4)])
def test_a_run_that_is_killed_repeatedly_gives_the_results_of_an_uninterrupted_one(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path, name: str, kills: int
) -> None:
    questions, output, chance = write_rows(folder, count=30), tmp_path / name, random.Random(name)
    run("batch", questions, tmp_path / "expected.jsonl", *options, "--json")
    killed = Killed("batch", questions, output, *options, "--batch-size", 1, "--json")
    lines = tmp_path / (name if name.endswith(".jsonl") else f"{name}.jsonl")
    counts = []
    for _ in range(kills):
        process = killed.start()
        # Kill it at moments from the first import to the last answer: after a time, or after a number of results.
        began, more = lines.stat().st_size if lines.exists() else 0, chance.choice([None, 1, 200])
        until = time.monotonic() + (chance.uniform(0, 4) if more is None else 120)
        while time.monotonic() < until and process.poll() is None:
            if more is not None and lines.exists() and lines.stat().st_size >= began + more:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(lines.read_bytes().count(b"\n") if lines.exists() else -1)
    assert counts == sorted(counts)
    # Later runs resumed from the answers of earlier ones.
    assert len(set(counts) - {-1, 0}) > 1
    process = killed.start()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["answered"] == 30
    assert json.loads(out)["before"] == counts[-1]
    assert read(output) == read(tmp_path / "expected.jsonl")
    wrote = {each for output in ("expected.jsonl", name) for each in (output, f"{output}.run.json")}
    assert {path.name for path in tmp_path.iterdir()} == wrote


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_resume(
    questions: Path, options: tuple[Any, ...], tmp_path: Path, stop: signal.Signals
) -> None:
    output = tmp_path / "out.jsonl"
    # More rows than can be answered before the signal.
    many = questions.with_name("many.jsonl")
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    many.write_text(
        "".join(json.dumps(row | {"id": f"{turn}-{row['id']}"}) + "\n" for turn in range(200) for row in rows)
    )
    process = Killed("batch", many, output, *options, "--batch-size", 1, "--max-new-tokens", 300).start()
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    # To its processes as well, as a terminal or a service manager sends it.
    os.killpg(process.pid, stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().startswith(f"Stopped. Results so far are saved; run the same command again to resume {output}.")
    assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size is an integer above 0 or auto, not '0'."),
        (["--replicas", "2"], "--replicas and --gpus-per-replica need --ray."),
        (["--batch-size", "many"], "--batch-size is an integer above 0 or auto, not 'many'."),
        (["--budget", "2"], "budget must be a number in (0, 1], got 2.0."),
        (["--method", "vlcache"], "Unknown method 'vlcache': did you mean 'vl-cache'?"),
        (["--model", "./nothing"], "There is no model folder ./nothing."),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    run: Run, questions: Path, llava: str, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    given = [] if "--model" in arguments else ["--model", llava]
    code, out, err = run("batch", questions, tmp_path / "out.jsonl", *given, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {sentence}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_run_does_not_resume_from_the_results_of_another(
    run: Run, questions: Path, folder: Path, llava: str, options: tuple[Any, ...], tmp_path: Path, name: str
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(llava, copied)
    (tmp_path / "results").mkdir()
    output = tmp_path / "results" / name
    assert run("batch", questions, output, *options)[0] == 0
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    changes: list[tuple[list[Any], str]] = [
        (["--model", copied], f'model "{llava}", not "{copied}"'),
        (["--method", "snapkv"], 'method "vl-cache", not "snapkv"'),
        (["--budget", 0.3], "budget 0.2, not 0.3"),
        (["--max-new-tokens", 13], "max_new_tokens 12, not 13"),
        (["--dtype", "bfloat16"], 'dtype "auto", not "bfloat16"'),
    ]
    for change, difference in changes:
        code, out, err = run("batch", questions, output, *options, *change, "--json")
        assert (code, out) == (2, "")
        end = "give the options that it was begun with, or name another file."
        assert err == f"Error: {output} holds results with {difference}: {end}\n"
    other = questions.with_name("other.jsonl")
    other.write_text(questions.read_text().replace(prompt_of(3), "Which?", 1))
    code, out, err = run("batch", other, output, *options, "--json")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {output} holds the answer to another prompt for row '0': give the prompts")
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before
    # More rows and another batch size are the same run.
    code, out, _ = run("batch", write_rows(folder, count=COUNT + 2), output, *options, "--batch-size", 2, "--json")
    assert (code, json.loads(out)["before"], json.loads(out)["answered"]) == (0, COUNT, COUNT + 2)


def test_unusable_files_are_refused(run: Run, questions: Path, folder: Path, llava: str, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = run("batch", *arguments, "--model", llava)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err.removeprefix("Error: ").rstrip()

    assert refused(tmp_path / "no.jsonl", tmp_path / "out.jsonl").startswith(f"Cannot read {tmp_path / 'no.jsonl'}")
    assert refused(questions, questions) == f"{questions} cannot be both the input and the output."
    assert "say with a prompt" in refused(folder, tmp_path / "out.jsonl")
    assert refused("a" * 300, tmp_path / "out.jsonl").startswith(f"Cannot read {'a' * 300}: File name too long")
    assert refused(questions, tmp_path) == f"{tmp_path} is a folder: name a file."
    assert refused(questions, "/dev/null") == "/dev/null is a device, not a file: name a file."
    assert refused(tmp_path / "no.jsonl", questions) == (
        f"There is no input {tmp_path / 'no.jsonl'}, but {questions} exists: name the input first, then the output."
    )
    (tmp_path / "notes.txt").write_text("hello")
    assert "holds something, but no notes.txt.run.json says what" in refused(questions, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "hello"


def test_parts_of_a_method_are_replaced_as_in_generate(
    run: Run, run_json: Callable[..., Any], questions: Path, folder: Path, options: tuple[Any, ...], tmp_path: Path
) -> None:
    parts = ("--score", "recency", "--allocate", "pyramid", "--reduce", "merge-nearest", "--decode", "fixed-point")
    output = tmp_path / "new" / "out.jsonl"
    assert run("batch", questions, output, *options, *parts)[0] == 0
    result = read(output)["0"]
    single = run_json("generate", "--image", folder / "0.png", "--prompt", prompt_of(0), *options, *parts)
    assert single["method"] == "vl-cache + recency + pyramid + merge-nearest + fixed-point"
    assert (result["text"], result["finish_reason"]) == (single["text"], single["finish_reason"])
    assert result["kept"] == pytest.approx(sum(single["kept_per_layer"]) / len(single["kept_per_layer"]))


def test_the_prompt_is_read_from_a_file(run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("What is it?\n")
    given = {"read": ("--prompt-file", tmp_path / "prompt.txt"), "written": ("--prompt", "What is it?")}
    for name, prompt in given.items():
        assert run("batch", folder, tmp_path / name, *prompt, *options)[0] == 0
    assert read(tmp_path / "read") == read(tmp_path / "written")
