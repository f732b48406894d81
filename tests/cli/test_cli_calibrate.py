import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsight.reader import model_path

Run = Callable[..., tuple[int, str, str]]


def test_scores_are_written_and_printed(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "heads.json"
    code, out, _ = run("calibrate", "--pages", 2, "--output", output)
    assert code == 0
    config = json.loads((model_path() / "config.json").read_text())["text_config"]
    scores = json.loads(output.read_text())["scores"]
    assert len(scores) == config["num_hidden_layers"]
    assert {len(layer) for layer in scores} == {config["num_key_value_heads"]}
    assert f"{scores[0][0]:.2f}" in out
    assert str(output) in " ".join(out.split())


def test_sparsemm_uses_measured_scores(run_json: Callable[..., Any], llava: str, image: str, tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    measured = run_json("calibrate", "--model", llava, "--pages", 1, "--output", heads)
    assert measured["pages"] == 1
    scores = [[0.0] * len(layer) for layer in measured["scores"]]
    scores[0][0] = 1.0
    heads.write_text(json.dumps({"scores": scores}))
    question = [
        "--model",
        llava,
        "--image",
        image,
        "--prompt",
        "What is it? " * 9,
        "--max-new-tokens",
        2,
        "--budget",
        0.8,
    ]
    result = run_json("generate", *question, "--method", "sparsemm", "--heads", heads)
    assert result["kept_per_layer"][0] > result["kept_per_layer"][1]


def test_sparsemm_needs_head_scores_for_other_models(run: Run, llava: str, image: str) -> None:
    question = ["generate", "--model", llava, "--image", image, "--prompt", "What?"]
    code, _, err = run(*question, "--method", "sparsemm")
    assert code == 2
    assert "needs head scores of this model's 3 layers with 2 KV heads, and none were given" in err
    code, _, err = run(*question, "--method", "vl-cache", "--heads", "heads.json")
    assert code == 2
    assert "--heads is for the allocation 'visual-heads', which vl-cache does not have" in err


def test_an_output_that_cannot_be_written_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    heads.write_text("{}")
    assert run("calibrate", "--output", heads) == (
        2,
        "",
        f"Error: {heads} exists: give --force to replace it, or another --output.\n",
    )
    assert heads.read_text() == "{}"
