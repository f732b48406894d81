"""The text tasks on a pretrained model; `make test-smollm` installs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsight.models.install import checkpoint_folder
from tests.cli.conftest import run, run_json  # noqa: F401, fixtures

pytestmark = pytest.mark.skipif(
    not checkpoint_folder("smollm2").is_dir(), reason="smollm2 is not installed: sparsight models --install smollm2"
)


def test_a_pretrained_model_knows_what_it_read_and_methods_lose_little_at_half(
    run_json: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    report = run_json(
        "eval", "--model", "smollm2", "--tasks", "continuation:120,retrieval:60,few-shot:24", "--methods",
        "vl-cache,streaming-llm", "--budgets", "0.5", "--limit", "3", "--output", tmp_path / "run",
    )  # fmt: skip
    assert (report["model"], report["passage"], report["dtype"]) == ("smollm2", "text", "float32")
    continuation, retrieval, few_shot = report["tasks"]
    assert 2 < continuation["full"]["perplexity"]["value"] < 40
    assert retrieval["full"]["exact"]["value"] == few_shot["full"]["exact"]["value"] == 1
    for cell in continuation["cells"]:
        assert 0 < cell["metrics"]["divergence"]["value"] < 0.5
        assert cell["metrics"]["same_tokens"]["value"] > 0.7
