"""The page tasks on the reader of 30 pretrained layers; `make test-smollm` installs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsight.models.install import checkpoint_folder
from tests.cli.conftest import run, run_json  # noqa: F401, fixtures

pytestmark = pytest.mark.skipif(
    not checkpoint_folder("reader-30").is_dir(),
    reason="reader-30 is not installed: sparsight models --install reader-30",
)


def test_it_reads_pages_and_a_compressed_cache_is_smaller(
    run_json: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    report = run_json(
        "eval", "--model", "reader-30", "--tasks", "look-up:8,transcribe:4", "--methods", "snapkv", "--budgets", "0.5",
        "--limit", "4", "--output", tmp_path / "run",
    )  # fmt: skip
    look_up, transcribe = report["tasks"]
    assert look_up["full"]["exact"]["value"] >= 0.75
    assert transcribe["full"]["rouge_l"]["value"] > 0.8
