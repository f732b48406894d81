import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsight.cli import main
from tests.support import tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.llava_next(tmp_path_factory.mktemp("llava_next")))


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(56, 80, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; returns the exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        # Discard what fixtures printed.
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Run the command line with ``--json``; returns the one object that it printed."""

    def call(*arguments: object) -> Any:
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call
