"""User errors: exit code 2, nothing on stdout, and one sentence on stderr."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.test_images import huge_png

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(run: Run, llava: str, image: str, tmp_path: Path) -> Callable[..., str]:
    """Run ``generate`` or ``inspect`` with valid options replaced by others; returns the error sentence."""

    def call(command: str, *options: object) -> str:
        output = ("--output", tmp_path / "kept.png") if command == "inspect" and "--output" not in options else ()
        given = {"--model": llava, "--prompt": "hi", "--image": image}
        rest = [argument for name, value in given.items() if name not in options for argument in (name, value)]
        code, out, err = run(command, *rest, *options, *output)
        assert (code, out) == (2, "")
        assert err.startswith("Error: ")
        assert err.endswith(".\n")
        assert err.count("\n") == 1
        return err.removeprefix("Error: ").rstrip()

    return call


COMMANDS = pytest.mark.parametrize("command", ["generate", "inspect"])


@COMMANDS
@pytest.mark.parametrize("budget", ["0", "-0.1", "1.01", "nan", "inf"])
def test_a_budget_outside_the_unit_interval(refused: Callable[..., str], command: str, budget: str) -> None:
    assert refused(command, "--budget", budget) == f"budget must be a number in (0, 1], got {float(budget)}."


@pytest.mark.parametrize("bound", ["0.5", "nan"])
def test_a_bound_below_one(refused: Callable[..., str], bound: str) -> None:
    sentence = f"prefill_bound must be a number of at least 1, got {float(bound)}."
    assert refused("generate", "--prefill-bound", bound) == sentence


def test_a_bound_for_a_method_that_merges(refused: Callable[..., str]) -> None:
    assert "'merge-nearest' merges" in refused("generate", "--prefill-bound", 3, "--method", "elastic")


@COMMANDS
def test_an_unknown_method(refused: Callable[..., str], command: str) -> None:
    assert refused(command, "--method", "vlcache").startswith("Unknown method 'vlcache': did you mean 'vl-cache'?")


@COMMANDS
def test_an_unknown_score(refused: Callable[..., str], command: str) -> None:
    assert refused(command, "--score", "mixkv:foo").startswith("Unknown score 'foo': known are post-vision, ")
    assert refused(command, "--score", "recency:random").startswith("Score 'recency' wraps no other: ")


@COMMANDS
def test_a_file_that_is_not_an_image(refused: Callable[..., str], command: str, image: str, tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("hello")
    cut.write_bytes(Path(image).read_bytes()[:2000])
    assert "is not a picture" in refused(command, "--image", text)
    assert "is damaged or cut short" in refused(command, "--image", cut)
    assert "No such file" in refused(command, "--image", tmp_path / "nothing.png")


@COMMANDS
def test_an_image_with_too_many_pixels(refused: Callable[..., str], command: str, image: str, tmp_path: Path) -> None:
    assert "more than the limit of 4,479 pixels" in refused(command, "--image", image, "--max-pixels", 4479)
    assert "more than the limit of 89,478,485 pixels" in refused(
        command, "--image", huge_png(tmp_path / "h.png", 12000)
    )


@COMMANDS
def test_a_prompt_that_contains_the_placeholder(refused: Callable[..., str], command: str) -> None:
    assert "must not spell '<image>'" in refused(command, "--prompt", "What is <image>?")


@COMMANDS
def test_a_folder_that_is_not_a_vision_language_model(
    refused: Callable[..., str], command: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    assert refused(command, "--model", tmp_path).endswith(
        "is a 'clip_vision_model' model, not a vision-language model."
    )
    assert refused(command, "--model", tmp_path / "nothing") == f"There is no model folder {tmp_path / 'nothing'}."


@COMMANDS
def test_an_unknown_dtype_or_device(refused: Callable[..., str], command: str) -> None:
    assert refused(command, "--dtype", "int8").startswith("Unknown dtype 'int8'")
    assert refused(command, "--device", "banana").startswith("There is no device 'banana'")
    assert refused(command, "--device", "meta").startswith("There is no device 'meta'")


@COMMANDS
def test_a_prompt_that_is_not_valid_text(refused: Callable[..., str], command: str) -> None:
    assert refused(command, "--prompt", "\udcff") == "The prompt is not valid Unicode."


def test_an_output_that_is_a_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    taken = tmp_path / "taken.png"
    taken.mkdir()
    assert refused("inspect", "--output", taken) == f"{taken} is a folder: name a file."


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "x", "--prompt", "hi", "--max-new-tokens", "0"],
        ["generate", "--model", "x", "--prompt", "hi", "--budget", "much"],
        ["generate", "--model", "x", "--prompt", "hi", "--wrong"],
        ["compress"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


def test_the_console_script_exits_with_two_and_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from sparsight.cli import main; main()",
            "generate",
            "--model",
            tmp_path,
            "--prompt",
            "x",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {tmp_path} is not a model that can be loaded: ")
    assert done.stderr.count("\n") == 1
