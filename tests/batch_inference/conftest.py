import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import tiny

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight pictures of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        noise = np.random.default_rng(number).integers(256, size=(56, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def prompt_of(number: int) -> str:
    """Prompts of several lengths."""
    return f"What is in picture {number}" + "?" * (number % 3 * 9 + 1)


@pytest.fixture(scope="session")
def asked(pictures: Path) -> Path:
    """A file of a question about each picture, and one about two of them."""
    rows: list[dict[str, Any]] = [
        {"id": f"row-{number}", "image": f"{number}.png", "prompt": prompt_of(number)} for number in range(8)
    ]
    rows.append({"id": "two", "images": ["0.png", "1.png"], "prompt": "Are they the same?"})
    path = pictures / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by id, every one of which there must be once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == len(records)
    return by_id


def lasting(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results without what differs from run to run."""
    return {row: {name: value for name, value in found.items() if name != "seconds"} for row, found in results.items()}
