"""Output paths follow one rule: missing folders are created, and results are replaced only with ``--force``."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsight.cli.output import check_file, check_folder

Run = Callable[..., tuple[int, str, str]]


def refusal(check: Callable[..., None], *arguments: object, replace: bool = True) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the whole message is compared
        check(*arguments, replace=replace)
    return str(caught.value)


def test_only_existing_content_needs_replace(tmp_path: Path) -> None:
    path = tmp_path / "a"
    check_file(path, replace=False)
    path.touch()
    check_file(path, replace=False)
    path.write_text("content")
    refused = f"{path} exists: give --force to replace it, or another --output."
    assert refusal(check_file, path, replace=False) == refused
    assert refusal(check_folder, tmp_path, "a", replace=False) == refused
    check_file(path, replace=True)
    assert path.read_text() == "content"


def test_missing_folders_are_not_created_by_the_check(tmp_path: Path) -> None:
    check_file(tmp_path / "new" / "folder" / "a", replace=False)
    check_folder(tmp_path / "new" / "folder", "a", replace=False)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("")
    os.mkfifo(pipe)
    assert refusal(check_file, tmp_path) == f"{tmp_path} is a folder: name a file."
    assert refusal(check_file, Path("/dev/null")) == "/dev/null is a device, not a file: name a file."
    assert refusal(check_file, pipe) == f"{pipe} is a device, not a file: name a file."
    assert refusal(check_file, file / "a") == f"{file} is not a folder."
    assert refusal(check_folder, file, "a") == f"{file} is not a folder: name a folder."
    assert refusal(check_file, tmp_path / ("a" * 300)).endswith(": File name too long.")


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("models.loading.load_model", "bench.shapes.random_model", "cli.session.open_session"):
        monkeypatch.setattr(f"sparsight.{function}", lambda *_, **__: pytest.fail("loaded"))


RESULTS = {"analyze": "analysis.json", "bench": "bench.json", "calibrate": None, "inspect": None}


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize("command", RESULTS)
def test_existing_results_are_kept_and_no_model_is_loaded(run: Run, image: str, tmp_path: Path, command: str) -> None:
    output = tmp_path / "out.png"
    results = output if RESULTS[command] is None else output / str(RESULTS[command])
    results.parent.mkdir(exist_ok=True)
    results.write_text("earlier")
    question = ("--image", image, "--prompt", "hi") if command == "inspect" else ()
    assert run(command, *question, "--output", output) == (
        2,
        "",
        f"Error: {results} exists: give --force to replace it, or another --output.\n",
    )
    assert results.read_text() == "earlier"


def test_force_replaces_a_plot_in_a_folder_that_is_created(run: Run, llava: str, image: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "a.png"
    arguments = ("inspect", "--model", llava, "--image", image, "--prompt", "hi", "--output", output)
    assert run(*arguments)[0] == 0
    first = output.read_bytes()
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--method", "snapkv", "--force")[0] == 0
    assert output.read_bytes() != first


def test_eval_refuses_a_file_before_the_model_is_loaded(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run("eval", "--model", "/nowhere", "--output", tmp_path / "file") == (
        2,
        "",
        f"Error: {tmp_path / 'file'} is not a folder: name a folder.\n",
    )
