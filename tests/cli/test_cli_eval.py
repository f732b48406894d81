import contextlib
import json
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsight import RECIPES
from sparsight.cli import eval as command
from sparsight.cli import main
from sparsight.cli.options import DEFAULT_MODEL
from sparsight.eval import metrics
from sparsight.eval.metrics import check_installed
from sparsight.eval.result_store import CELLS, ResultStore
from sparsight.reader import model_path
from tests.support import tiny

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--tasks", "look-up:2,transcribe:2", "--methods", "vl-cache,elastic", "--budgets", "0.2,0.5", "--limit", 4)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    template = (model_path() / "chat_template.jinja").read_text()
    return str(tiny.llava(tmp_path_factory.mktemp("talker"), chat_template=template))


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """Results without their times."""
    kept = json.loads(json.dumps(results))
    for task in kept["tasks"]:
        del task["full_seconds"]
        for cell in task["cells"]:
            del cell["seconds"]
    return kept


def test_json_holds_the_results(run_json: Callable[..., Any], talker: str, tmp_path: Path) -> None:
    report = run_json("eval", "--model", talker, *SMALL, "--output", tmp_path / "run")
    assert report == json.loads((tmp_path / "run" / "results.json").read_text())
    assert (report["model"], report["seed"], report["examples"], report["dtype"]) == (talker, 0, 4, "float32")
    assert [task["task"] for task in report["tasks"]] == ["look-up:2", "transcribe:2"]
    for task in report["tasks"]:
        cells = [(cell["method"], cell["budget"]) for cell in task["cells"]]
        assert cells == [("vl-cache", 0.2), ("vl-cache", 0.5), ("elastic", 0.2), ("elastic", 0.5)]


def test_a_model_without_images_has_tasks_of_its_own(run_json: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "llama")
    report = run_json(
        "eval", "--model", model, "--tasks", "continuation:50,retrieval:50,few-shot", "--methods", "vl-cache",
        "--budgets", "0.2", "--limit", 2, "--passage-as-vision", "--output", tmp_path / "run",
    )  # fmt: skip
    assert [task["task"] for task in report["tasks"]] == ["continuation:50", "retrieval:50", "few-shot:64"]
    assert (report["passage"], report["model"]) == ("vision", str(model))


def test_only_a_models_own_tasks_and_options_are_taken(run: Run, talker: str, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "llama")
    for arguments, message in (
        ((model, "--tasks", "look-up"), "Unknown task 'look-up': known are continuation, retrieval, few-shot."),
        ((talker, "--tasks", "few-shot"), "Unknown task 'few-shot': known are look-up, conversation, transcribe, "),
        ((talker, "--passage-as-vision"), "--passage-as-vision and --against are for models without images."),
        ((talker, "--against", "kvpress"), "--passage-as-vision and --against are for models without images."),
        ((model, "--tasks", "retrieval:2000", "--output", tmp_path / "long"), "but the model takes 4,096 in all."),
        ((model, "--against", "vllm"), "Unknown value of --against 'vllm': it can only be 'kvpress'."),
    ):
        code, out, err = run("eval", "--output", tmp_path / "run", "--model", *arguments)
        assert (code, out) == (2, "")
        assert message in err
    assert not (tmp_path / "run").exists()


def test_tables_and_the_names_of_the_files_are_printed(run: Run, talker: str, tmp_path: Path) -> None:
    code, out, err = run("eval", "--model", talker, *SMALL, "--output", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "look-up:2, one record of a page: exact match, 4 examples, full cache" in out
    assert "transcribe:2, the complete page, read out: ROUGE-L, 4 examples, full cache" in out
    assert out.count("elastic") == 2
    for name in ("results.json", "report.md", "report.html", "accuracy.png"):
        assert name in out
        assert (tmp_path / "run" / name).exists()


def test_the_full_cache_alone_has_headlines_and_no_empty_tables(run: Run, talker: str, tmp_path: Path) -> None:
    code, out, err = run("eval", "--model", talker, *SMALL, "--methods", "full", "--output", tmp_path / "run")
    assert (code, err) == (0, "")
    assert " ".join(out.split()).count(", full cache ") == 2
    assert "method" not in out


def test_a_missing_library_is_named_before_the_weights_are_loaded(
    run: Run, talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics._anls_score.cache_clear()
    monkeypatch.setitem(sys.modules, "anls_star", None)
    monkeypatch.setattr("sparsight.models.loading.load_model", lambda *_: pytest.fail("loaded"))
    code, out, err = run("eval", "--model", talker, *SMALL, "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err == ("Error: ANLS needs the package anls-star, which is not installed: pip install 'sparsight[eval]'.\n")
    # Tasks of models without images need none.
    check_installed({"exact", "perplexity", "divergence", "held"})
    assert not (tmp_path / "run").exists()


def test_a_killed_run_resumes_and_gives_the_same_results(
    run_json: Callable[..., Any], talker: str, tmp_path: Path
) -> None:
    options = ["--model", talker, "--tasks", "look-up:2", "--methods", "vl-cache,elastic,h2o", "--budgets", "0.2,0.5"]
    options += ["--limit", "5", "--batch", "1"]
    uninterrupted = run_json("eval", *options, "--output", tmp_path / "uninterrupted")
    lines = tmp_path / "killed" / CELLS
    # A fork has torch loaded already.
    process = multiprocessing.get_context("fork").Process(
        target=main, args=(["eval", *options, "--output", str(lines.parent)],)
    )
    process.start()
    while process.is_alive() and (not lines.exists() or lines.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = lines.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before.count(b"\n") < (tmp_path / "uninterrupted" / CELLS).read_bytes().count(b"\n")
    resumed = run_json("eval", *options, "--output", lines.parent)
    assert without_times(resumed) == without_times(uninterrupted)
    assert lines.read_bytes().startswith(before)
    assert lines.read_bytes().count(b"\n") == (tmp_path / "uninterrupted" / CELLS).read_bytes().count(b"\n")


def test_a_run_that_is_terminated_stops_as_by_ctrl_c(talker: str, tmp_path: Path) -> None:
    arguments = ["eval", "--model", talker, "--tasks", "look-up:2", "--methods", "vl-cache", "--limit", "2000"]
    process = multiprocessing.get_context("fork").Process(target=main, args=([*arguments, "--output", str(tmp_path)],))
    process.start()
    lines = tmp_path / CELLS
    while process.is_alive() and (not lines.exists() or lines.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 130
    assert all(json.loads(line) for line in lines.read_text().splitlines())


def test_a_second_run_on_the_folder_is_refused(run: Run, talker: str, tmp_path: Path) -> None:
    def other() -> None:
        code, _, err = run("eval", "--model", talker, *SMALL, "--output", tmp_path)
        sys.exit(code if err == f"Error: Another run is writing {tmp_path}.\n" else 9)

    code, _, _ = run("eval", "--model", talker, *SMALL, "--output", tmp_path)
    before = (tmp_path / CELLS).read_bytes()
    about = json.loads((tmp_path / "run.json").read_text())
    with ResultStore(tmp_path, about):
        process = multiprocessing.get_context("fork").Process(target=other)
        process.start()
        process.join()
    assert (code, process.exitcode) == (0, 2)
    assert (tmp_path / CELLS).read_bytes() == before


def test_the_total_is_known_before_the_model_is_loaded(
    run: Run, talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(command, "progress", lambda *_, **__: contextlib.nullcontext(lambda *call: calls.append(call)))
    monkeypatch.setattr(
        "sparsight.models.loading.load_model", lambda *_: calls.append(("loading", 0, 0)) or pytest.fail("loaded")
    )
    with pytest.raises(pytest.fail.Exception):
        main(["eval", "--model", talker, *map(str, SMALL), "--output", str(tmp_path)])
    # Two tasks, the full cache and two methods at two budgets, four examples.
    assert calls == [("Loading the model", 0, 2 * 5 * 4), ("loading", 0, 0)]


def test_a_long_run_says_how_long_it_takes(
    run: Run, talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LONG_SECONDS", 0)
    monkeypatch.setattr("sparsight.eval.evaluator.remaining_seconds", lambda *_: 9900.0)
    code, _, err = run("eval", "--model", talker, *SMALL, "--output", tmp_path)
    assert code == 0
    # Two small batches of each task with the full cache and one recipe were measured for the estimate.
    assert re.match(
        r"\d\d results to measure, about 2 h 45 min\. Fewer --tasks, --methods or --budgets or a lower", err
    )
    assert command._duration(150) == "2 min"


def test_a_stopped_run_says_how_to_resume(
    run: Run, talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsight.eval.evaluator.run_evaluation", interrupted)
    code, out, err = run("eval", "--model", talker, *SMALL, "--output", tmp_path)
    assert (code, out) == (130, "")
    assert err == f"Stopped. Results so far are saved; run the same command again to resume {tmp_path}.\n"


def test_all_methods_exclude_the_full_cache_and_those_without_head_scores() -> None:
    names = [recipe.name for recipe in command._recipes(DEFAULT_MODEL, "all", "0.1", None)]
    assert names == [name for name in RECIPES if name != "full"]
    assert command._recipes(DEFAULT_MODEL, "full", "0.1", None) == []
    # There are no head scores for another model.
    names = [recipe.name for recipe in command._recipes("other", "all", "0.1", None)]
    assert names == [name for name in RECIPES if name not in ("full", "sparsemm")]


def test_budgets_are_sorted_and_unique() -> None:
    budgets = [recipe.budget for recipe in command._recipes("other", "vl-cache, vl-cache", "0.5,0.1, 0.5", None)]
    assert budgets == [0.1, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "lookup"), "Unknown task 'lookup': did you mean 'look-up'?"),
        (("--tasks", "look-up:0"), "Task look-up takes the number of records on the page as its size, 1 to 64, not"),
        (("--methods", "vlcache"), "Unknown method 'vlcache': did you mean 'vl-cache'?"),
        (("--budgets", "0.1,2"), "budget must be a number in (0, 1], got 2.0."),
        (("--budgets", "0.1;0.2"), "Budgets are numbers separated by commas, such as 0.01,0.05,"),
        (("--model", "/nowhere/at/all"), "There is no model folder /nowhere/at/all."),
        (("--keep", "disk"), "Unknown value of --keep 'disk': it can only be 'host'."),
        (("--keep", "host", "--harness", "lmms-eval"), "--keep is for conversations, of which lmms-eval has none"),
        (("--harness", "lmmseval"), "Unknown harness 'lmmseval': did you mean 'lmms-eval'? Known are sparsight, "),
        (
            ("--harness", "lmms-eval"),
            "lmms-eval has too many tasks to run all of them: name some with --tasks, such as",
        ),
    ],
)
def test_unmeasurable_options_are_refused(
    run: Run, talker: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    given = () if "--model" in options else ("--model", talker)
    code, out, err = run("eval", *given, *options, "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_conversations_with_the_full_cache_in_host_memory(run: Run, talker: str, tmp_path: Path) -> None:
    small = ("--tasks", "conversation:2", "--methods", "vl-cache,sparsight-recall", "--budgets", "0.1", "--limit", 2)
    code, out, _ = run("eval", "--model", talker, *small, "--keep", "host", "--json", "--output", tmp_path / "run")
    assert code == 0
    report = json.loads(out)
    assert report["keep"] == "host"
    assert [cell["method"] for cell in report["tasks"][0]["cells"]] == ["vl-cache", "sparsight-recall"]
    code, _, err = run("eval", "--model", talker, *small, "--output", tmp_path / "run")
    assert code == 2
    assert "has a run with keep 'host', not None: give --output another folder" in err


def test_a_folder_of_another_run_is_refused(run: Run, talker: str, tmp_path: Path) -> None:
    small = ("--tasks", "look-up:2", "--methods", "vl-cache", "--budgets", "0.5", "--limit", 2)
    assert run("eval", "--model", talker, *small, "--output", tmp_path)[0] == 0
    code, out, err = run("eval", "--model", talker, *small, "--seed", 1, "--output", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"Error: {tmp_path} has a run with seed 0, not 1: give --output another folder.\n"


def test_a_template_without_turns_is_refused(run: Run, llava: str, tmp_path: Path) -> None:
    code, _, err = run("eval", "--model", llava, "--tasks", "conversation", "--limit", 2, "--output", tmp_path)
    assert code == 2
    assert err == ("Error: The model's chat template rewrites earlier turns, so a conversation cannot be continued.\n")


def test_a_missing_harness_says_how_to_install_it(
    run: Run, talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.split(".")[0] == "lmms_eval" or name == "sparsight.eval.lmms_model"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    code, out, err = run(
        "eval", "--model", talker, "--harness", "lmms-eval", "--tasks", "docvqa_val", "--output", tmp_path
    )
    assert (code, out) == (2, "")
    assert err.startswith("Error: lmms-eval cannot be used: ")
    assert err.endswith(" Install it with pip install 'sparsight[lmms-eval]'.\n")


def test_a_papers_tables_are_shown_beside_an_empty_column(run: Run, tmp_path: Path) -> None:
    code, out, err = run("eval", "--paper", "tgv-kv", "--model", "llava-hf/llava-1.5-7b-hf", "--output", tmp_path)
    assert (code, err) == (0, "")
    assert "arXiv 2606.03075" in " ".join(out.split())
    assert [line.split() for line in out.splitlines() if line.startswith("snapkv ")][:2] == [
        ["snapkv", "50", "%", "17.9", "23.0", "54.1", "47.3"],
        ["snapkv", "20", "%", "16.6", "20.5", "53.6", "44.6"],
    ]
    assert "Table 3, LLaVA-1.5-7B" in out and "Qwen" not in out.partition("Table 2")[2]
    # On one line, to be copied.
    assert out.splitlines()[-1].startswith("sparsight eval --harness lmms-eval --model llava-hf/llava-1.5-7b-hf ")
    assert list(tmp_path.iterdir()) == []


def test_json_holds_a_papers_cells_with_their_source(run_json: Callable[..., Any]) -> None:
    shown = run_json("eval", "--paper", "tgv-kv")
    (cell,) = [
        cell
        for cell in shown["cells"]
        if (cell["checkpoint"], cell["task"], cell["method"], cell["budget"])
        == ("Qwen/Qwen3-VL-8B-Instruct", "docvqa_val", "tgv-kv", 0.05)
    ]
    assert (cell["value"], cell["ours"], cell["arxiv"], cell["table"]) == (88.0, None, "2606.03075", 2)
    assert set(shown["commands"]) == {cell["checkpoint"] for cell in shown["cells"]}


def test_unknown_papers_and_their_models_are_refused(run: Run) -> None:
    assert run("eval", "--paper", "tgvkv")[2] == "Error: Unknown paper 'tgvkv': it can only be 'tgv-kv'.\n"
    code, out, err = run("eval", "--paper", "tgv-kv", "--model", "other")
    assert (code, out) == (2, "")
    assert err.startswith("Error: The tables have no model 'other', only llava-hf/llava-1.5-7b-hf, ")


def test_a_paper_is_not_shown_with_options_that_it_does_not_use(run: Run) -> None:
    code, out, err = run("eval", "--paper", "tgv-kv", "--limit", "50", "--methods", "all", "--json")
    assert (code, out) == (2, "")
    assert err == "Error: --paper only shows tables, of --model and --output: leave out --methods, --limit.\n"
