"""The folder of a run has every result that was written, and none that was cut short."""

import json
import multiprocessing
import re
import sys
from pathlib import Path

import pytest

from sparsight.eval.result_store import CELLS, RUN, ResultStore

ABOUT = {"model": "m", "seed": 1}
RECIPE = json.dumps({"name": "x", "budget": 0.1})


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "new" / "run", ABOUT)
    store.append("look-up:8", RECIPE, {0: {"exact": 1.0}, 3: {"exact": 0.0}}, 1.5)
    store.append("look-up:8", RECIPE, {4: {"exact": 1.0}}, 0.5)
    for again in (store, ResultStore(tmp_path / "new" / "run", ABOUT)):
        assert again.cell("look-up:8", RECIPE) == {0: {"exact": 1.0}, 3: {"exact": 0.0}, 4: {"exact": 1.0}}
        assert again.seconds("look-up:8", RECIPE) == 2.0
        assert again.cell("look-up:9", RECIPE) == {}
        assert again.seconds("look-up:9", RECIPE) == 0


def test_an_example_that_was_measured_again_counts_once(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, ABOUT)
    store.append("t", RECIPE, {0: {"exact": 0.0}}, 1)
    store.append("t", RECIPE, {0: {"exact": 1.0}, 1: {"exact": 1.0}}, 1)
    assert ResultStore(tmp_path, ABOUT).cell("t", RECIPE) == {0: {"exact": 1.0}, 1: {"exact": 1.0}}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_short_is_dropped_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    store = ResultStore(tmp_path, ABOUT)
    store.append("t", RECIPE, {0: {"exact": 0.0}}, 1)
    store.append("t", RECIPE, {1: {"exact": 0.0}}, 1)
    lines = tmp_path / CELLS
    lines.write_bytes(lines.read_bytes()[:-cut])
    again = ResultStore(tmp_path, ABOUT)
    assert again.cell("t", RECIPE) == {0: {"exact": 0.0}}
    again.append("t", RECIPE, {2: {"exact": 1.0}}, 1)
    assert ResultStore(tmp_path, ABOUT).cell("t", RECIPE) == {0: {"exact": 0.0}, 2: {"exact": 1.0}}


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path: Path) -> None:
    def claim() -> int:
        process = multiprocessing.get_context("fork").Process(target=use, args=(tmp_path,))
        process.start()
        process.join()
        return process.exitcode or 0

    with ResultStore(tmp_path, ABOUT) as store:
        store.append("t", RECIPE, {0: {"exact": 0.0}}, 1)
        assert claim() == 3
        assert len((tmp_path / CELLS).read_text().splitlines()) == 1
    assert claim() == 0


def use(folder: Path) -> None:
    """Append to a run; exits with 3 if it is in use."""
    try:
        ResultStore(folder, ABOUT).append("t", RECIPE, {1: {"exact": 0.0}}, 1)
    except ValueError as error:
        sys.exit(3 if str(error) == f"Another run is writing {folder}." else 4)


def test_another_run_is_refused(tmp_path: Path) -> None:
    ResultStore(tmp_path, ABOUT)
    message = f"{tmp_path} has a run with seed 1, not 2: give --output another folder."
    with pytest.raises(ValueError, match=re.escape(message)):
        ResultStore(tmp_path, {**ABOUT, "seed": 2})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="has files that are no run: give --output another folder"):
        ResultStore(tmp_path, ABOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Cannot use .*file for results: "):
        ResultStore(tmp_path / "file", ABOUT)


@pytest.mark.parametrize("name", [RUN, CELLS])
def test_damaged_results_are_refused(tmp_path: Path, name: str) -> None:
    ResultStore(tmp_path, ABOUT)
    (tmp_path / name).write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"The results in .* are damaged"):
        ResultStore(tmp_path, ABOUT)
