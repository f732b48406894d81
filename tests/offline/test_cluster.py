"""A real Ray of two workers on this machine: the same results as without it, also when one of them is killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.offline.conftest import lasting, prompt_of, read

pytest.importorskip("ray")

COUNT = 40
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


def test_a_worker_that_is_killed_is_replaced(
    llava: str, many: Path, tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    output = tmp_path / "out.jsonl"
    process = start(llava, many, output, *RAY)
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    both = workers(process)
    both[0].kill()
    told = finished(process)
    assert len(both) == 2
    assert (told["answered"], told["errors"]) == (COUNT, {"unreadable file": 1})
    assert lasting(read(output)) == expected


def test_a_run_that_is_killed_goes_on_with_and_without_a_cluster(
    llava: str, many: Path, tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    output, counts = tmp_path / "out.jsonl", [0]
    for more in (1, 900, 2000):
        process = start(llava, many, output, *RAY)
        enough = more + (output.stat().st_size if output.exists() else 0)
        while not output.exists() or output.stat().st_size < enough:
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
        process.kill()
        # Ray's own processes leave when nobody owns them any more.
        process.communicate()
        counts.append(output.read_bytes().count(b"\n"))
    told = finished(start(llava, many, output))
    assert counts == sorted(set(counts))
    assert told["before"] == counts[-1] < COUNT
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
