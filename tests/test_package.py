"""The installed package is complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built wheel, installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("sparsight-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return folder


def test_the_installed_package_answers_with_the_bundled_model(installed: Path, tmp_path: Path) -> None:
    example = json.loads((ROOT / "examples/questions.json").read_text())[0]
    script = "import sys, sparsight.cli as cli; print(cli.__file__, file=sys.stderr); cli.main()"
    arguments = ["generate", "--image", str(ROOT / "examples" / example["image"]), "--prompt", example["question"]]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr.startswith(str(installed))
    assert json.loads(run.stdout)["text"] == example["answer"]
    assert json.loads(run.stdout)["vision_tokens"] == 576
