from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sparsight.reader import model_path
from tests.support import tiny


@dataclass(frozen=True)
class Talker:
    """A tiny model that takes turns."""

    folder: str
    model: Any
    processor: Any


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    template = (model_path() / "chat_template.jinja").read_text()
    folder = str(tiny.llava(tmp_path_factory.mktemp("talker"), chat_template=template))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return Talker(folder, model, AutoProcessor.from_pretrained(folder))


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    """A tiny model without images; its processor is its tokenizer."""
    folder = str(tiny.llama(tmp_path_factory.mktemp("llama")))
    return Talker(folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[str], None]:
    """Draws a picture of a name into the test's folder."""
    return lambda name: Image.new("RGB", (20, 20), "red").save(tmp_path / name)
