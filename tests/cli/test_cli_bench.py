import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from sparsight.bench import kvpress, machine
from sparsight.bench import shapes as module
from sparsight.bench.kvpress import CannotRun
from sparsight.methods import RECIPES
from sparsight.utils import memory

Run = Callable[..., tuple[int, str, str]]
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = ("--contexts", "120,160", "--batch", "1,2", "--new-tokens", 3, "--rounds", 1)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SHAPES, "small", LlamaConfig(**TINY))
    monkeypatch.setattr(machine, "COPIED_BYTES", {"cpu": 2**16})


def test_json_holds_every_cell(run_json: Callable[..., Any], tmp_path: Path) -> None:
    report = run_json("bench", *SMALL, "--methods", "full,vl-cache", "--budgets", "0.5,0.1", "--output", tmp_path)
    assert report == json.loads((tmp_path / "bench.json").read_text())
    assert (report["model"], report["dtype"], report["new_tokens"]) == ("small, random weights", "float32", 3)
    methods = [("transformers", 1), ("kept-length", 0.1), ("kept-length", 0.5), ("full", 1)]
    methods += [("vl-cache", 0.1), ("vl-cache", 0.5)]
    expected = [(context, batch, *method) for context in (120, 160) for batch in (1, 2) for method in methods]
    assert [(cell["context"], cell["batch"], cell["method"], cell["budget"]) for cell in report["cells"]] == expected
    for cell in report["cells"]:
        assert cell["reason"] is None
        if cell["method"] in ("transformers", "full"):
            assert cell["entry_bytes"] == cell["batch"] * cell["context"] * 2 * 2 * (2 * 8 * 4)
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "growth.png", "speed-up.png"}


def test_the_tables_fit_eighty_columns(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("bench", *SMALL, "--methods", "elastic,sparsight", "--output", tmp_path)
    assert (code, err) == (0, "")
    assert out.count("prompt of 120 tokens, batch 2") == 1
    assert out.count("sparsight 10 %") == 8
    assert "…" not in out
    assert "Wrote bench.json, growth.png, speed-up.png in" in out


def test_a_checkpoints_language_part_is_measured(run_json: Callable[..., Any], llava: str, tmp_path: Path) -> None:
    options = ("--contexts", 120, "--new-tokens", 2, "--rounds", 1, "--methods", "vl-cache,sparsight")
    report = run_json("bench", "--model", llava, *options, "--against", "none", "--output", tmp_path)
    assert report["model"] == llava
    assert [cell["method"] for cell in report["cells"]] == ["vl-cache", "sparsight"]
    assert [cell["entry_bytes"] for cell in report["cells"]][1] == 12 * 3 * 2 * (2 * 8 * 4)


def test_all_methods_are_those_that_the_model_can_be_measured_with(run: Run, tmp_path: Path) -> None:
    options = ("--contexts", 40, "--new-tokens", 2, "--rounds", 1, "--against", "none")
    code, out, err = run("bench", *options, "--methods", "all", "--output", tmp_path)
    assert code == 0
    assert err.startswith("Left out sparsemm: ") and err.count("\n") == 1
    measured = [cell["method"] for cell in json.loads((tmp_path / "bench.json").read_text())["cells"]]
    assert measured == ["full", *(name for name in RECIPES if name not in ("full", "sparsemm"))]
    # A method that is named is not left out.
    code, out, err = run("bench", *options, "--methods", "sparsemm", "--output", tmp_path / "other")
    assert (code, out) == (2, "") and "Error: " in err


def test_sizes_that_do_not_fit_are_reported(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    options = ("--contexts", "120,100k", "--new-tokens", 2, "--rounds", 1, "--methods", "vl-cache")
    code, out, err = run("bench", *options, "--output", tmp_path)
    assert (code, err) == (0, "")
    assert " ".join(out.split()).count("does not fit") == 3
    reasons = {cell["context"]: cell["reason"] for cell in json.loads((tmp_path / "bench.json").read_text())["cells"]}
    assert reasons[120] is None
    assert reasons[102400].startswith("does not fit: about 0.1 GiB needed, 0.0 GiB free")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "llava-7b"), "Unknown shape 'llava-7b': did you mean 'llava-"),
        (("--methods", "vlcache"), "Unknown method 'vlcache': did you mean 'vl-cache'?"),
        (
            ("--contexts", "2k,much"),
            "--contexts takes integers of at least 1 separated by commas, such as 2k,8k, not",
        ),
        (("--batch", "0"), "--batch takes integers of at least 1 separated by commas, such as 2k,8k, not '0'."),
        (("--budgets", "2"), "budget must be a number in (0, 1], got 2.0."),
        (("--against", "vllm"), "Unknown comparison 'vllm': "),
        (("--dtype", "int8"), "Unknown dtype 'int8'"),
        (("--device", "banana"), "There is no device 'banana'"),
        (("--model", "/nowhere/at/all"), "There is no model folder /nowhere/at/all."),
        (("--methods", "sparsemm"), "Allocation 'visual-heads' "),
    ],
)
def test_unmeasurable_options_are_refused(run: Run, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, out, err = run("bench", *SMALL, *options, "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.bench.benchmark.run_benchmark", lambda *_: pytest.fail("measured"))
    taken = tmp_path / "taken"
    taken.write_text("")
    assert run("bench", *SMALL, "--output", taken) == (2, "", f"Error: {taken} is not a folder: name a folder.\n")


def test_weights_that_do_not_fit_are_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**30)
    code, _, err = run("bench", "--shape", "llava-next-34b", "--dtype", "bfloat16", "--output", tmp_path)
    assert code == 2
    assert err == (
        "Error: The weights of llava-next-34b take 64.1 GiB in bfloat16, and cpu has 1.0 GiB free: "
        "choose another shape, dtype or device.\n"
    )


def test_kvpress_is_set_up_only_when_requested_and_its_failure_is_reported(
    run_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Path:
        raise CannotRun("kvpress cannot be installed: no network")

    monkeypatch.setattr(kvpress, "environment", refuse)
    options = ("--contexts", 120, "--new-tokens", 2, "--rounds", 1, "--methods", "snapkv", "--output", tmp_path)
    report = run_json("bench", *options, "--against", "transformers,kvpress")
    reasons = {cell["method"]: cell["reason"] for cell in report["cells"]}
    assert reasons == {
        "transformers": None, "kept-length": None, "kvpress": "kvpress cannot be installed: no network", "snapkv": None
    }  # fmt: skip
    monkeypatch.setattr(kvpress, "environment", lambda: pytest.fail("set up"))
    assert len(run_json("bench", *options, "--force")["cells"]) == 3


def test_the_token_limit_counts_the_weights_once_and_the_entries_of_every_sequence(
    run_json: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--contexts", 120, "--batch", 3, "--new-tokens", 2, "--rounds", 1, "--budgets", 0.1)
    report = run_json("bench", *options, "--methods", "full,sparsight,adakv", "--output", tmp_path)
    # Three sequences, two layers, two KV heads, twelve entries, each a key and a value of eight float32 numbers.
    entries = 3 * 2 * 2 * 12 * (2 * 8 * 4)
    for cell in report["cells"]:
        read = cell["token_limit"]["median"] * cell["copy_bandwidth"]["median"] - report["weight_bytes"]
        assert round(read) == (entries * 10 if cell["budget"] == 1 else entries)
    (kept,) = [cell for cell in report["cells"] if cell["method"] == "kept-length"]
    assert (kept["prompt_tokens"], kept["of_kept_length"]) == (12, 1)


def test_sizes_after_the_time_is_up_are_reported(run_json: Callable[..., Any], tmp_path: Path) -> None:
    report = run_json("bench", *SMALL, "--methods", "vl-cache", "--minutes", 0, "--output", tmp_path)
    assert {cell["reason"] for cell in report["cells"]} == {"not measured: the time was up"}
    assert [(cell["context"], cell["batch"]) for cell in report["cells"][::3]] == [
        (120, 1),
        (120, 2),
        (160, 1),
        (160, 2),
    ]


def test_a_method_named_twice_runs_once(run_json: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--contexts", 120, "--new-tokens", 2, "--rounds", 1, "--against", "none")
    report = run_json("bench", *options, "--methods", "full, h2o,full", "--output", tmp_path)
    assert [cell["method"] for cell in report["cells"]] == ["full", "h2o"]
    assert set(RECIPES) >= {"full", "h2o"}


def test_head_scores_are_passed_to_sparsemm(run_json: Callable[..., Any], tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps({"scores": [[1.0, 0.0], [0.0, 0.0]]}))
    options = ("--contexts", 120, "--new-tokens", 2, "--rounds", 1, "--against", "none", "--methods", "sparsemm")
    report = run_json("bench", *options, "--heads", heads, "--output", tmp_path / "run")
    assert [(cell["method"], cell["reason"]) for cell in report["cells"]] == [("sparsemm", None)]


def test_kvzip_is_measured_on_a_shape_which_has_no_tokenizer(run_json: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--contexts", 120, "--new-tokens", 2, "--rounds", 1, "--against", "none", "--methods", "kvzip")
    report = run_json("bench", *options, "--output", tmp_path)
    assert [(cell["method"], cell["reason"]) for cell in report["cells"]] == [("kvzip", None)]
