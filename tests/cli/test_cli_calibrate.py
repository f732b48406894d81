import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsight.reader import model_path
from sparsight.reader.transcript import random_transcript

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


def test_own_transcripts_give_the_scores_of_the_same_pages(run_json: Callable[..., Any], tmp_path: Path) -> None:
    lines = []
    for number in range(3):
        page = random_transcript(np.random.default_rng([0, number]))
        page.picture.save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "text": page.text, "places": page.places}) + "\n")
    file = tmp_path / "pages.jsonl"
    file.write_text("".join(lines))
    own = run_json("calibrate", "--transcripts", file, "--output", tmp_path / "own.json")
    generated = run_json("calibrate", "--pages", 3, "--output", tmp_path / "heads.json")
    assert own["scores"] == generated["scores"]
    assert own["pages"] == 3
    first = run_json("calibrate", "--transcripts", file, "--pages", 1, "--output", tmp_path / "1.json")
    assert first["pages"] == 1
    assert first["scores"] != own["scores"]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"image": "page.png", "text": "A"}',
        '{"image": "page.png", "text": "AB", "places": [[0, 0]]}',
        '{"image": "page.png", "text": "A", "places": [[0, 1.5]]}',
        '{"image": "page.png", "text": "A", "places": [7]}',
    ],
)
def test_a_transcript_without_a_place_for_every_character_is_refused(run: Run, tmp_path: Path, line: str) -> None:
    (tmp_path / "pages.jsonl").write_text(line)
    code, _, err = run("calibrate", "--transcripts", tmp_path / "pages.jsonl", "--output", tmp_path / "heads.json")
    assert code == 2
    assert "line 1 is not an object such as" in err
    assert not (tmp_path / "heads.json").exists()


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
