from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import Qwen2_5_VLConfig

from sparsight.models.inputs import prepare
from sparsight.models.loading import Checkpoint, load_checkpoint
from tests.support import tiny

IMAGE = Image.new("RGB", (56, 56), "teal")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.llava(tmp_path_factory.mktemp("llava"))))


def text_of(checkpoint: Checkpoint, inputs: Any) -> str:
    assert inputs["input_ids"].shape[0] == 1
    return checkpoint.processor.tokenizer.decode(inputs["input_ids"][0])


PICTURE = "<image>" * tiny.GRID**2


def test_the_chat_template_places_pictures_before_the_prompt(checkpoint: Checkpoint) -> None:
    inputs = prepare(checkpoint, [IMAGE, IMAGE], "What is it?")
    assert text_of(checkpoint, inputs) == f"<s><|user|>{PICTURE}\n{PICTURE}\nWhat is it?<|assistant|>"
    assert inputs["pixel_values"].shape == (2, 3, tiny.SIDE, tiny.SIDE)


def test_a_prompt_needs_no_picture(checkpoint: Checkpoint) -> None:
    inputs = prepare(checkpoint, [], "What is it?")
    assert text_of(checkpoint, inputs) == "<s><|user|>What is it?<|assistant|>"
    assert "pixel_values" not in inputs


def test_without_a_chat_template_the_prompt_follows_the_pictures(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(tiny.llava(tmp_path, chat_template=None)))
    assert text_of(checkpoint, prepare(checkpoint, [IMAGE], "What is it?")) == f"{PICTURE}\nWhat is it?"
    assert text_of(checkpoint, prepare(checkpoint, [], "What is it?")) == "What is it?"


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, None])
@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_that_spells_the_placeholder_is_refused(tmp_path: Path, template: str | None, images: int) -> None:
    checkpoint = load_checkpoint(str(tiny.llava(tmp_path, chat_template=template)))
    with pytest.raises(ValueError, match="must not spell '<image>'"):
        prepare(checkpoint, [IMAGE] * images, "What is an <image> tag?")


def test_a_prompt_that_spells_the_video_placeholder_is_refused(checkpoint: Checkpoint) -> None:
    config = Qwen2_5_VLConfig(
        image_token_id=checkpoint.processor.tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=checkpoint.processor.tokenizer.convert_tokens_to_ids("<video>"),
    )
    qwen = Checkpoint("qwen", config, checkpoint.processor)
    with pytest.raises(ValueError, match="must not spell '<video>'"):
        prepare(qwen, [], "What is a <video>?")


def test_a_chat_template_that_fails_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.processor, "chat_template", "{{ raise_exception('No system prompt') }}")
    with pytest.raises(ValueError, match=r"The processor of .* refuses the question: No system prompt\."):
        prepare(checkpoint, [], "What is it?")


def test_a_chat_template_that_leaves_pictures_out_is_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.processor, "chat_template", "{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(
        ValueError, match=r"^The processor of .* refuses the question: [^.\n]*number of images[^.\n]*\.$"
    ):
        prepare(checkpoint, [IMAGE], "What is it?")
