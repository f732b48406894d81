import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from sparsight.eval.analysis import analyze, summarize
from sparsight.models.images import open_image
from sparsight.models.inputs import prepare
from sparsight.models.loading import load_checkpoint
from tests.support import tiny

Run = Callable[..., tuple[int, str, str]]


def test_json_holds_the_analysis_of_the_prompts(
    run_json: Callable[..., Any], llava: str, image: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = ["What is it?", "Where?"]
    prompts.write_text("".join(json.dumps({"image": image, "prompt": each}) + "\n" for each in questions))
    report = run_json(
        "analyze", "--model", llava, "--prompts", prompts, "--budget", 0.3, "--threshold", 0.02, "--max-new-tokens", 5,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert report == json.loads((tmp_path / "out" / "analysis.json").read_text())
    checkpoint, model = load_checkpoint(llava), AutoModelForImageTextToText.from_pretrained(llava)
    findings = [analyze(model, prepare(checkpoint, [open_image(image)], each), 0.3, 0.02, 5) for each in questions]
    expected = summarize(findings)
    assert {name: report[name] for name in expected} == expected
    assert (report["prompts"], report["budget"], report["threshold"], report["layers"]) == (2, 0.3, 0.02, [0, 1, 2])
    plot = np.asarray(Image.open(tmp_path / "out" / "analysis.png").convert("L"))
    assert plot.std() > 10


def test_an_interrupted_analysis_keeps_the_prompts_so_far(
    run: Run, llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analyzed = []

    def interrupt_third(*arguments: Any) -> Any:
        if len(analyzed) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        analyzed.append(analyze(*arguments))
        return analyzed[-1]

    monkeypatch.setattr("sparsight.eval.analysis.analyze", interrupt_third)
    code, out, err = run("analyze", "--model", llava, "--limit", 5, "--max-new-tokens", 3, "--output", tmp_path)
    assert (code, out) == (130, "")
    assert err == f"Stopped. analysis.json and analysis.png in {tmp_path} are of the first 2 of 5 prompts.\n"
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["prompts"] == 2
    assert found["sparsity"] == summarize(analyzed)["sparsity"]
    assert (tmp_path / "analysis.png").exists()


def test_a_table_of_the_layers_is_printed(run: Run, llava_next: str, tmp_path: Path) -> None:
    code, out, err = run("analyze", "--model", llava_next, "--limit", 2, "--max-new-tokens", 3, "--output", tmp_path)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == [str(layer) for layer in range(tiny.LAYERS)]
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert report["source"] == "generated pages"
    for layer, row in enumerate(rows):
        shares = [float(number) for number in row[1:] if number != "%"]
        assert sum(shares[3:]) == pytest.approx(100, abs=0.2)
        assert shares[0] == round(report["sparsity"]["prefill"]["mean"][layer] * 100, 1)
    assert "Wrote analysis.json and analysis.png in" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "2"), "budget must be a number in (0, 1], got 2.0."),
        (("--threshold", "0"), "threshold must be a number in (0, 1], got 0.0."),
        (("--prompts", "/nowhere.jsonl"), "Cannot read /nowhere.jsonl: No such file or directory."),
        (("--model", "/nowhere/at/all"), "There is no model folder /nowhere/at/all."),
    ],
)
def test_unanalyzable_options_are_refused(
    run: Run, llava: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    given = () if "--model" in options else ("--model", llava)
    assert run("analyze", *given, *options, "--limit", 1, "--output", tmp_path / "out") == (
        2,
        "",
        f"Error: {message}\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(run: Run, llava: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = run(
        "analyze", "--model", llava, "--limit", 1, "--max-new-tokens", 2, "--output", tmp_path / "file"
    )
    assert (code, out) == (2, "")
    assert err == f"Error: {tmp_path / 'file'} is not a folder: name a folder.\n"
