"""What all subcommands have in common: help, start-up, signals, and output that cannot be written."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import sparsight
from sparsight.bench.benchmark import LIBRARIES
from sparsight.bench.shapes import SHAPES
from sparsight.cli import options
from sparsight.cli.app import COMMANDS, load
from sparsight.cli.models import INSTALLABLE
from sparsight.compression.recipe import KINDS
from sparsight.eval.tasks import TASKS, TEXT_TASKS
from sparsight.models.install import PACKAGES
from sparsight.models.loading import DTYPES
from sparsight.utils.method_names import ALIASES, METHODS, PARTS
from sparsight.utils.text import escape

Run = Callable[..., tuple[int, str, str]]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def start(*command: object, **options: object) -> "subprocess.Popen[str]":
    # Background jobs of a shell ignore Ctrl-C, and the tests may be one.
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT, preexec_fn=reset, text=True, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def imported_by(*arguments: str) -> set[str]:
    """Modules that a command line imports."""
    script = f"""
import sys
from sparsight.cli import main
try:
    main({list(arguments)!r})
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""
    return set(start("-c", script, stdout=subprocess.DEVNULL).communicate(timeout=60)[1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], [], ["genrate"], ["--vresion"]])
def test_help_and_typos_do_not_import_heavy_libraries(arguments: list[str]) -> None:
    imported = imported_by(*arguments)
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "matplotlib", "numpy", "PIL"}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--mistyped"])
def test_options_of_a_command_are_parsed_without_heavy_libraries(name: str, option: str) -> None:
    imported = imported_by(name, option)
    assert f"sparsight.cli.{name}" in imported
    assert not imported & {"torch", "transformers", "matplotlib"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--method", "vlcache"],
        ["batch", "a.jsonl", "b.jsonl", "--budget", "2"],
        ["eval", "--methods", "vl-cache,snap-kv"],
        ["eval", "--budgets", "0.1,0"],
        ["eval", "--harness", "lmms"],
        ["eval", "--against", "vllm"],
        ["eval", "--paper", "tgv"],
        ["bench", "--shape", "large"],
        ["analyze", "--budget", "0"],
        ["generate", "--score", "foo"],
        ["inspect", "--score", "mixkv:foo"],
        ["generate", "--allocate", "uniformly"],
        ["batch", "a.jsonl", "b.jsonl", "--reduce", "foo"],
        ["inspect", "--decode", "foo"],
        ["eval", "--dtype", "foo"],
        ["models", "--install", "foo"],
    ],
)
def test_mistyped_values_are_refused_without_heavy_libraries(run: Run, arguments: list[str]) -> None:
    assert not imported_by(*arguments) & {"torch", "transformers", "matplotlib"}
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"Error: (Unknown|budget must be) [^\n]+\.\n", err)


def test_methods_are_found_by_their_names() -> None:
    assert [name for name, make in sparsight.RECIPES.items() if make().name != name] == []
    assert list(METHODS) == list(sparsight.RECIPES)
    assert set(ALIASES.values()) <= set(METHODS)
    assert {role: list(kinds) for role, kinds in PARTS.items()} == {role: list(kinds) for role, kinds in KINDS.items()}


def test_help_names_what_options_take(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    out = run("bench", "--help")[1]
    assert ", ".join(SHAPES) in out
    assert ", ".join(LIBRARIES) in out
    assert all(dtype in out for dtype in DTYPES) and options.DTYPES == DTYPES
    assert tuple(PACKAGES) == INSTALLABLE and ", ".join(INSTALLABLE) in run("models", "--help")[1]
    listed = " ".join(run("eval", "--help")[1].split())
    assert f"Tasks: {', '.join(TASKS)}, or all" in listed and f"without images: {', '.join(TEXT_TASKS)}." in listed


def test_a_command_imports_only_itself() -> None:
    imported = imported_by("methods", "--json")
    assert "sparsight.cli.methods" in imported
    assert not imported & {f"sparsight.cli.{name}" for name in COMMANDS if name != "methods"}


def test_the_package_imports_its_names_on_first_use() -> None:
    script = "import sys, sparsight; print('torch' in sys.modules); sparsight.batch; print('torch' in sys.modules)"
    assert start("-c", script, stdout=subprocess.PIPE).communicate(timeout=60)[0].split() == ["False", "True"]


def test_the_package_has_its_public_names_and_no_others() -> None:
    assert set(sparsight._MODULES) == set(sparsight.__all__) <= set(dir(sparsight))
    modules = [getattr(sparsight, name).__module__ for name in sparsight.__all__ if name != "RECIPES"]
    assert all(module.startswith("sparsight.") for module in modules)
    with pytest.raises(AttributeError, match="module 'sparsight' has no attribute 'compress'"):
        sparsight.compress  # noqa: B018


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_the_commands(run: Run, option: str) -> None:
    code, out, err = run(option)
    assert (code, err) == (0, "")
    listed = re.findall(r"^│ (\w+) +\w", out.partition("Commands")[2], re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(name, "-h")
    assert (code, err) == (0, "")
    assert f" {name} [OPTIONS]" in out
    assert "--json" in out or name == "chat"
    undocumented = [param.name for param in load(name).params if not param.help]
    assert undocumented == []


def test_a_mistyped_command_is_corrected(run: Run) -> None:
    code, out, err = run("genrate")
    assert (code, out) == (2, "")
    assert "Did you mean 'generate'?" in err


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"sparsight {sparsight.__version__}\n", "")
    assert re.fullmatch(r"\d+\.\d+.*", sparsight.__version__)


def test_python_runs_the_package() -> None:
    process = start("-m", "sparsight", "--version", stdout=subprocess.PIPE)
    assert process.communicate(timeout=60) == (f"sparsight {sparsight.__version__}\n", "")


def test_the_shell_completes_commands_and_options() -> None:
    def complete(*words: str) -> set[str]:
        script = "import sys; sys.argv[0] = 'sparsight'; from sparsight.cli import main; main([])"
        variables = {"_SPARSIGHT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": "1"}
        variables["COMP_CWORD"] = str(len(words) - 1)
        done = subprocess.run(
            [sys.executable, "-c", script], env=ENVIRONMENT | variables, capture_output=True, text=True, check=True
        )
        return set(done.stdout.split())

    assert complete("sparsight", "mo") == {"models"}
    assert complete("sparsight", "methods", "--js") == {"--json"}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_imports_leaves_no_traceback(tmp_path: Path, stop: signal.Signals) -> None:
    # A stand-in for torch that is interrupted while it is imported.
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sparsight.cli import main; main(['methods'])"
    process = start("-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(stop)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -stop


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_exit_leaves_no_traceback(stop: signal.Signals) -> None:
    script = """
import atexit, time
from sparsight.cli import main
atexit.register(lambda: (print("leaving", flush=True), time.sleep(60)))
main(["methods", "--json"])
"""
    process = start("-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[")
    assert process.stdout.readline() == "leaving\n"
    process.send_signal(stop)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -stop


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"], ["--help"]])
def test_a_full_device_is_one_sentence(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = start("-m", "sparsight", *arguments, stdout=full)
        assert process.communicate(timeout=60)[1] == "Error: Cannot write the output: No space left on device.\n"
    assert process.returncode == 1


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"]])
def test_a_broken_pipe_is_one_sentence(arguments: list[str]) -> None:
    process = start("-m", "sparsight", *arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "Error: Cannot write the output: Broken pipe.\n"
    assert process.wait(timeout=60) == 1


def test_control_characters_are_escaped() -> None:
    assert escape("a\x1b[31m\nb\x9b\u2028\udcff") == "a\\x1b[31m\\nb\\x9b\\u2028\\udcff"
    assert escape("\x1b\n\tb", keep="\n\t") == "\\x1b\n\tb"
    assert escape("Grüße, 日本\u3000語 👩\u200d💻") == "Grüße, 日本\u3000語 👩\u200d💻"


def test_names_from_outside_are_neither_control_sequences_nor_markup(run: Run, llava: str, tmp_path: Path) -> None:
    name = tmp_path / "\x1b[31m[red]x"
    code, out, err = run("generate", "--model", name, "--prompt", "hi")
    assert (code, out) == (2, "")
    assert err == f"Error: There is no model folder {tmp_path}/\\x1b[31m[red]x.\n"
    code, out, err = run(
        "analyze", "--model", llava, "--limit", 1, "--max-new-tokens", 1, "--output", tmp_path / "\x1b[31m[red]y"
    )
    assert (code, err) == (0, "")
    assert out.endswith(f"Wrote analysis.json and analysis.png in {tmp_path}/\\x1b[31m[red]y\n")


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_prompt_is_read_from_a_file_or_standard_input(
    run_json: Callable[..., object], llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    question = b"What is it,\nand where?"
    (tmp_path / "question.txt").write_bytes(question + b"\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question + b"\n")))
    given = ("--prompt-file", tmp_path / "question.txt") if source == "file" else ("--prompt", "-")
    read = run_json("generate", "--model", llava, *given, "--max-new-tokens", 3)
    written = run_json("generate", "--model", llava, "--prompt", question.decode(), "--max-new-tokens", 3)
    assert isinstance(read, dict)
    assert isinstance(written, dict)
    assert (read["text"], read["prompt_tokens"]) == (written["text"], written["prompt_tokens"])


def test_a_prompt_that_cannot_be_read_is_refused(run: Run, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = run("generate", *arguments)
        assert (code, out) == (2, "")
        return err.removeprefix("Error: ").rstrip()

    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    reading = "Cannot read the question from"
    assert refused() == "There is no question: give --prompt or --prompt-file."
    assert refused("--prompt", "a", "--prompt-file", "b") == "--prompt and --prompt-file exclude each other."
    assert refused("--prompt-file", tmp_path / "no") == f"{reading} {tmp_path / 'no'}: No such file or directory."
    assert refused("--prompt-file", tmp_path) == f"{reading} {tmp_path}: Is a directory."
    assert refused("--prompt-file", tmp_path / "latin.txt") == f"{reading} {tmp_path}/latin.txt: it is not UTF-8 text."


def test_progress_is_shown_on_a_terminal_unless_quiet(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    arguments = ("calibrate", "--pages", 1, "--force", "--output", tmp_path / "heads.json")
    code, _, err = run(*arguments)
    assert code == 0
    assert "Reading pages" in err
    for option in ("--quiet", "-q", "--json"):
        code, _, err = run(*arguments, option)
        assert (code, err) == (0, "")


def test_the_status_shows_the_name_of_a_model_literally(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, err = run("generate", "--model", "/[red]no\x1b[2Jwhere", "--prompt", "hi")
    assert code == 2
    assert "Reading /[red]no\\x1b[2Jwhere" in err
    assert "Reading" not in run("generate", "--model", "/nowhere", "--prompt", "hi", "--quiet")[2]
