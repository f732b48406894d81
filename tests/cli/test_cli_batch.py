"""``sparsight batch``: every kind of file, and runs that are killed."""

import hashlib
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import sparsight
from sparsight.reader import model_path

Run = Callable[..., tuple[int, str, str]]
TOKENS = 12
COUNT = 7


def prompt_of(number: int) -> str:
    return "What is it" + "?" * (number % 3 * 9 + 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise."""
    folder = tmp_path_factory.mktemp("asked")
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(256, size=(56, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def write_rows(folder: Path, *more: dict[str, Any], count: int = COUNT) -> Path:
    path = folder / f"asked-{count}.jsonl"
    numbers = range(count)
    rows = [{"id": str(each), "image": f"{each % COUNT}.png", "prompt": prompt_of(each)} for each in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return path


@pytest.fixture(scope="session")
def asked(folder: Path) -> Path:
    """A question about each of them."""
    return write_rows(folder)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by id, without what differs from run to run; there must be one of each."""
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
def expected(run: Run, asked: Path, options: tuple[Any, ...], tmp_path: Path) -> dict[str, dict[str, Any]]:
    run("batch", asked, tmp_path / "expected.jsonl", *options, "--json")
    return read(tmp_path / "expected.jsonl")


def test_the_figures_are_those_of_the_results(run: Run, asked: Path, options: tuple[Any, ...], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    code, out, err = run("batch", asked, output, *options, "--json")
    told, records = json.loads(out), read(output).values()
    assert (code, err) == (0, "")
    assert set(read(output)) == {str(number) for number in range(COUNT)}
    assert (told["rows"], told["answered"], told["before"], told["errors"]) == (COUNT, COUNT, 0, {})
    assert told["new_tokens"] == sum(record["tokens"] for record in records) == COUNT * TOKENS
    for name in ("kv_bytes", "full_kv_bytes"):
        assert told[name] == sum(record[name] for record in records)
    assert told["rows_per_second"] == pytest.approx(COUNT / told["seconds"])
    assert told["output"] == str(output)


def test_one_row_answers_as_generate_does(
    run_json: Callable[..., Any], folder: Path, expected: dict[str, dict[str, Any]], options: tuple[Any, ...]
) -> None:
    for number in range(3):
        prompt = ("--image", folder / f"{number}.png", "--prompt", prompt_of(number))
        single = run_json("generate", *prompt, *options)
        found = expected[str(number)]
        assert found["text"] == single["text"]
        assert found["prompt_tokens"] == single["prompt_tokens"]
        assert found["kept"] == pytest.approx(sum(single["kept_per_layer"]) / len(single["kept_per_layer"]))


def test_rows_on_the_same_image_answer_as_without_host_memory(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path
) -> None:
    source = write_rows(folder, count=2 * COUNT)
    for memory, output in (("0", "expected.jsonl"), ("64MiB", "reused.jsonl")):
        code, _, err = run("batch", source, tmp_path / output, *options, "--host-memory", memory, "--json")
        assert (code, err) == (0, "")
    assert read(tmp_path / "reused.jsonl") == read(tmp_path / "expected.jsonl")
    code, _, err = run("batch", source, tmp_path / "other.jsonl", *options, "--host-memory", "much")
    assert code == 2
    assert "--host-memory takes a number of bytes such as 8GiB or 500MB, not 'much'." in err


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("kind", ["folder", "bytes", "data set"])
def test_every_kind_of_input_and_output_has_the_same_answers(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path, kind: str, name: str
) -> None:
    single = tmp_path / "single.jsonl"
    rows = [{"id": f"{number}.png", "image": str(folder / f"{number}.png")} for number in range(COUNT)]
    single.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = folder
    if kind != "folder":
        source = tmp_path / "asked.parquet"
        pictures: list[Any] = [Path(row["image"]).read_bytes() for row in rows]
        if kind == "data set":
            pictures = [{"bytes": picture, "path": None} for picture in pictures]
        parquet.write_table(pyarrow.table({"id": [row["id"] for row in rows], "image": pictures}), source)
    for given, output in ((single, "expected.jsonl"), (source, name)):
        code, _, err = run("batch", given, tmp_path / output, "--prompt", "What is it?", *options, "--json")
        assert (code, err) == (0, "")
    assert read(tmp_path / name) == read(tmp_path / "expected.jsonl")
    assert len(read(tmp_path / name)) == COUNT


def test_errors_are_counted_by_kind_and_tell_by_the_exit_code(
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
    # It is said again when nothing is left to do, and nothing is done again.
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
    """Runs of the command line that end when they are killed."""

    def __init__(self, *arguments: object, before: str = "") -> None:
        self.command = [sys.executable, "-c", f"{before}from sparsight.cli import main; main()", *map(str, arguments)]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def start(self) -> "subprocess.Popen[bytes]":
        # A shell lets what it runs in the background ignore Ctrl-C, and the tests may be.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(self.command, env=self.environment, preexec_fn=heard, start_new_session=True, **pipes)


@pytest.mark.parametrize(("name", "kills"), [("out.jsonl", 10), ("out.parquet", 4)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path, name: str, kills: int
) -> None:
    asked, output, chance = write_rows(folder, count=30), tmp_path / name, random.Random(name)
    run("batch", asked, tmp_path / "expected.jsonl", *options, "--json")
    killed = Killed("batch", asked, output, *options, "--batch-size", 1, "--json")
    lines = tmp_path / (name if name.endswith(".jsonl") else f"{name}.jsonl")
    counts = []
    for _ in range(kills):
        process = killed.start()
        # Moments from the start of the imports to the last answer: after so much time, or so many more results.
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
    # The later ones went on with what the earlier ones had answered.
    assert len(set(counts) - {-1, 0}) > 1
    process = killed.start()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["answered"] == 30
    assert json.loads(out)["before"] == counts[-1]
    assert read(output) == read(tmp_path / "expected.jsonl")
    wrote = {each for output in ("expected.jsonl", name) for each in (output, f"{output}.run.json")}
    assert {path.name for path in tmp_path.iterdir()} == wrote


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_run_that_is_stopped_keeps_its_results_and_says_so(
    asked: Path, options: tuple[Any, ...], tmp_path: Path, name: str, send: Callable[[int, int], None]
) -> None:
    output = tmp_path / "out.jsonl"
    # So many rows that none of them can be the last one when the signal comes.
    many = asked.with_name("many.jsonl")
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    many.write_text(
        "".join(json.dumps(row | {"id": f"{turn}-{row['id']}"}) + "\n" for turn in range(200) for row in rows)
    )
    # As the command line's entry point handles it.
    before = "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler); "
    arguments = ("batch", many, output, *options, "--batch-size", 1, "--max-new-tokens", 300)
    process = Killed(*arguments, before=before).start()
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    # A terminal and some supervisors signal all processes of the group.
    send(process.pid, signal.Signals[name])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == f"Stopped. Results so far are saved; run the same command again to resume {output}.\n"
    results = output.read_text()
    assert len(read(output)) == results.count("\n") > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size must be an integer above 0 or auto, not '0'."),
        (["--replicas", "2"], "--replicas and --gpus-per-replica are for --ray, which is not given."),
        (["--batch-size", "many"], "--batch-size must be an integer above 0 or auto, not 'many'."),
        (["--budget", "2"], "budget must be a number in (0, 1], got 2.0."),
        (["--method", "vlcache"], "Unknown method 'vlcache': did you mean 'vl-cache'?"),
        (["--model", "./nothing"], "There is no model folder ./nothing."),
    ],
)
def test_wrong_options_are_said_before_anything_is_written(
    run: Run, asked: Path, llava: str, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    given = [] if "--model" in arguments else ["--model", llava]
    code, out, err = run("batch", asked, tmp_path / "out.jsonl", *given, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {sentence}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_run_does_not_go_on_with_the_results_of_another(
    run: Run, asked: Path, folder: Path, llava: str, options: tuple[Any, ...], tmp_path: Path, name: str
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(llava, copied)
    (tmp_path / "results").mkdir()
    output = tmp_path / "results" / name
    assert run("batch", asked, output, *options)[0] == 0
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    changes: list[tuple[list[Any], str]] = [
        (["--model", copied], f'model "{llava}", not "{copied}"'),
        (["--method", "snapkv"], 'method "vl-cache", not "snapkv"'),
        (["--budget", 0.3], "budget 0.2, not 0.3"),
        (["--max-new-tokens", 13], "max_new_tokens 12, not 13"),
        (["--dtype", "bfloat16"], 'dtype "auto", not "bfloat16"'),
    ]
    for change, difference in changes:
        code, out, err = run("batch", asked, output, *options, *change, "--json")
        assert (code, out) == (2, "")
        end = "give the options that it was started with, or name another file."
        assert err == f"Error: {output} holds results with {difference}: {end}\n"
    other = asked.with_name("other.jsonl")
    other.write_text(asked.read_text().replace(prompt_of(3), "Which?", 1))
    code, out, err = run("batch", other, output, *options, "--json")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {output} holds the answer to another prompt for row '0': give the prompts")
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before
    # More rows are no other run, and how rows are put together decides nothing.
    code, out, _ = run("batch", write_rows(folder, count=COUNT + 2), output, *options, "--batch-size", 2, "--json")
    assert (code, json.loads(out)["before"], json.loads(out)["answered"]) == (0, COUNT, COUNT + 2)


def test_files_that_cannot_be_used(run: Run, asked: Path, folder: Path, llava: str, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = run("batch", *arguments, "--model", llava)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err.removeprefix("Error: ").rstrip()

    assert refused(tmp_path / "no.jsonl", tmp_path / "out.jsonl").startswith(f"Cannot read {tmp_path / 'no.jsonl'}")
    assert refused(asked, asked) == f"{asked} cannot be both the input and the output."
    assert "needs a prompt" in refused(folder, tmp_path / "out.jsonl")
    (tmp_path / "notes.json").write_text("hello")
    assert "holds something, but there is no notes.json.run.json" in refused(asked, tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == "hello"
    assert "needs a suffix for its format: .jsonl" in refused(asked, tmp_path / "o.csv")
    assert refused(asked, "/dev/null").startswith("The output /dev/null is a device or a pipe: name a file, or -")
    assert refused(tmp_path / "new.jsonl", asked).endswith("INPUT comes first, then OUTPUT.")
    assert refused(asked, tmp_path / "out.jsonl", "--keep", "text").startswith("The field 'text' cannot be kept")
    assert {path.name for path in tmp_path.iterdir()} == {"notes.json"}


def test_float_ids_are_errors_that_say_so_and_integers_stay_integers(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path
) -> None:
    images = [(folder / f"{number}.png").read_bytes() for number in range(2)]
    source, output = tmp_path / "asked.parquet", tmp_path / "out.parquet"
    arguments = ("batch", source, output, "--prompt", "What?", *options, "--json")
    parquet.write_table(pyarrow.table({"id": [1.0, None], "image": images}), source)
    code, out, err = run(*arguments)
    assert (code, err, json.loads(out)["errors"]) == (1, "", {"malformed row": 2})
    rows = parquet.read_table(output).to_pylist()
    assert [(row["id"], row["row"]) for row in rows] == [(None, 1), (None, 2)]
    assert rows[0]["error"].startswith("Row 1 has the id 1.0, a float;")
    # Once the input is mended, the same command answers it.
    parquet.write_table(pyarrow.table({"id": [1, 2**40], "image": images, "label": [3, 4]}), source)
    code, out, err = run(*arguments)
    assert (code, err, json.loads(out)["answered"], json.loads(out)["not_in_input"]) == (0, "", 2, 0)
    table = parquet.read_table(output)
    assert table.schema.field("id").type == pyarrow.int64()
    assert sorted(table["id"].to_pylist()) == [1, 2**40]
    (tmp_path / "kept").mkdir()
    kept = tmp_path / "kept" / "out.jsonl"
    assert run("batch", source, kept, "--prompt", "What?", "--keep", "label", *options)[0] == 0
    assert {row["id"]: row["label"] for row in map(json.loads, kept.read_text().splitlines())} == {1: 3, 2**40: 4}


def test_errors_are_retried_on_request(run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path) -> None:
    source, output = write_rows(tmp_path, count=1), tmp_path / "out.jsonl"
    code, out, _ = run("batch", source, output, *options, "--json")
    assert (code, json.loads(out)["errors"]) == (1, {"unreadable file": 1})
    shutil.copy(folder / "0.png", tmp_path)
    assert run("batch", source, output, *options, "--json")[0] == 1
    code, out, err = run("batch", source, output, *options, "--retry-errors", "--json")
    summary = json.loads(out)
    assert (code, err, summary["answered"], summary["before"], summary["errors"]) == (0, "", 1, 0, {})
    assert read(output)["0"]["text"]


def test_rows_without_a_result_are_said(
    run: Run, asked: Path, options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.cli.batch._answer", lambda *_: iter(()))
    code, out, err = run("batch", asked, tmp_path / "out.parquet", *options)
    assert code == 1
    assert err == (f"Error: {COUNT} rows have no result: the input changed during the run. Repeat the command.\n")
    assert "Wrote" not in out


def test_an_input_that_shrank_is_counted_alone(
    run: Run, folder: Path, options: tuple[Any, ...], tmp_path: Path
) -> None:
    for count, rows, others in ((3, 3, 0), (2, 2, 1)):
        source = write_rows(folder, count=count)
        code, out, _ = run("batch", source, tmp_path / "out.jsonl", *options, "--json")
        summary = json.loads(out)
        assert (code, summary["rows"], summary["answered"], summary["not_in_input"]) == (0, rows, rows, others)
    _, out, _ = run("batch", source, tmp_path / "out.jsonl", *options)
    assert ["results", "of", "rows", "not", "in", "the", "input", "1"] in [line.split() for line in out.splitlines()]


def test_standard_input_and_output(asked: Path, options: tuple[Any, ...], expected: dict[str, dict[str, Any]]) -> None:
    process = Killed("batch", "-", "-", *options)
    found = subprocess.run(
        process.command, env=process.environment, input=asked.read_bytes(), cwd=asked.parent, capture_output=True,
        check=True,
    )  # fmt: skip
    records = [json.loads(line) for line in found.stdout.splitlines()]
    assert {record["id"]: {**record, "seconds": None} for record in records} == expected
    assert ["answered", str(COUNT)] in [line.split() for line in found.stderr.decode().splitlines()]
    # A reader that has gone, as after `| head -1`.
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        process.command, env=process.environment, input=asked.read_bytes(), cwd=asked.parent, stdout=writer,
        stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (1, b"Error: Cannot write the output: Broken pipe.\n")


def test_the_run_file_names_the_shipped_model_and_the_version(run: Run, asked: Path, tmp_path: Path) -> None:
    assert run("batch", asked, tmp_path / "out.jsonl", "--max-new-tokens", 1)[0] == 0
    settings = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    weights = hashlib.sha256((model_path() / "model.safetensors").read_bytes()).hexdigest()
    assert (settings["model"], settings["weights_sha256"]) == ("reader", weights)
    assert settings["sparsight"] == version("sparsight")
    assert str(model_path()) not in json.dumps(settings)


def test_the_default_method_is_that_of_python(
    run: Run, asked: Path, llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    monkeypatch.setattr("sparsight.batch_inference.api.run_job", lambda job, *_: jobs.append(job) or ())
    assert list(sparsight.batch(asked, model=llava)) == []
    assert run("batch", asked, tmp_path / "out.jsonl", "--model", llava)[0] == 0
    assert json.loads((tmp_path / "out.jsonl.run.json").read_text()) == {**jobs[0].settings, "keep": []}


def test_a_bounded_prefill_gives_the_same_answers(
    run: Run, asked: Path, options: tuple[Any, ...], expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert run("batch", asked, output, *options, "--prefill-bound", 3)[0] == 0
    assert {key: {**row, "seconds": None} for key, row in read(output).items()} == expected
    code, _, err = run("batch", asked, tmp_path / "new.jsonl", *options, "--prefill-bound", 0.5)
    assert (code, err) == (2, "Error: prefill_bound must be a number of at least 1, got 0.5.\n")
