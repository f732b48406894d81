from collections.abc import Callable
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
