"""A real Ray of two workers on this machine: the same results as without it, also when one of them is killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.batch_inference.conftest import lasting, prompt_of, read

pytest.importorskip("ray")

COUNT = 60
KILLS = 10
TOKENS = 12


@pytest.fixture(scope="module")
def many(pictures: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": f"row-{number}", "image": f"{number % 8}.png", "prompt": prompt_of(number)} for number in range(COUNT)
    ]
    path = pictures / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad", "image": "no.png", "prompt": "?"}]))
    return path


def start(model: str, source: Path, output: Path, *options: object) -> "subprocess.Popen[bytes]":
    arguments = ["batch", source, output, "--model", model, "--max-new-tokens", TOKENS, "--json", *options]
    return subprocess.Popen(
        [sys.executable, "-c", "from sparsight.cli import main; main()", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process: "subprocess.Popen[bytes]") -> Any:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, err.decode()
    return json.loads(out)


def workers(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Ray's processes that hold a model."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [each for each in found if "_Replica" in " ".join(each.cmdline())]


RAY = ("--ray", "local", "--replicas", 2, "--batch-size", 2)


@pytest.fixture(scope="module")
def expected(llava: str, many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("expected") / "out.jsonl"
    assert finished(start(llava, many, path))["errors"] == {"unreadable file": 1}
    return lasting(read(path))


def size(output: Path) -> int:
    return output.stat().st_size if output.exists() else 0


def test_two_workers_give_the_results_that_none_give(
    llava: str, many: Path, tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    told = finished(start(llava, many, tmp_path / "out.jsonl", *RAY))
    assert (told["rows"], told["answered"], told["errors"]) == (COUNT + 1, COUNT, {"unreadable file": 1})
    assert lasting(read(tmp_path / "out.jsonl")) == expected


def test_a_worker_that_is_killed_is_replaced(
    llava: str, many: Path, tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    output = tmp_path / "out.jsonl"
    process = start(llava, many, output, *RAY)
    while not size(output):
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    both = workers(process)
    both[0].kill()
    told = finished(process)
    assert len(both) == 2
    assert (told["answered"], told["errors"]) == (COUNT, {"unreadable file": 1})
    assert lasting(read(output)) == expected


def test_a_run_that_is_killed_again_and_again_goes_on_with_and_without_a_cluster(
    llava: str, many: Path, tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    output, chance, counts = tmp_path / "out.jsonl", random.Random(5), [0]
    for _ in range(KILLS):
        process = start(llava, many, output, *RAY)
        # Moments from the start of the imports to the last answer: after so much time, or so many more results.
        began, more = size(output), chance.choice([None, 1, 300])
        until = time.monotonic() + (chance.uniform(0, 10) if more is None else 300)
        while time.monotonic() < until and (more is None or size(output) < began + more) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        # Ray's own processes leave when nobody owns them any more.
        process.communicate()
        counts.append(output.read_bytes().count(b"\n") if output.exists() else 0)
    told = finished(start(llava, many, output))
    assert counts == sorted(counts)
    # The later ones went on with what the earlier ones had answered.
    assert len(set(counts)) > 3
    assert told["before"] == counts[-1]
    assert lasting(read(output)) == expected


def test_a_cluster_that_is_not_there(llava: str, many: Path, tmp_path: Path) -> None:
    process = start(llava, many, tmp_path / "out.jsonl", "--ray", "auto")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, b"")
    assert err.decode().splitlines()[-1] == "Error: There is no Ray cluster at 'auto'; local starts one."


def test_a_worker_that_cannot_load_the_model_says_why(llava: str, many: Path, tmp_path: Path) -> None:
    process = start(llava, many, tmp_path / "out.jsonl", *RAY, "--device", "banana")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, b"")
    last = err.decode().splitlines()[-1]
    assert last.startswith("Error: A worker of the Ray cluster failed: ")
    assert "There is no device 'banana'" in last
