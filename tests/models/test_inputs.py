import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AddedToken, Qwen2_5_VLConfig

from sparsight.models.images import ImageError
from sparsight.models.inputs import check_image, check_length, check_text, prepare
from sparsight.models.loading import Checkpoint, load_checkpoint
from sparsight.reader import model_path
from tests.support import tiny
from tests.support.processors import REAL, processor

IMAGE = Image.new("RGB", (56, 56), "teal")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.llava(tmp_path_factory.mktemp("llava"))))


def text_of(checkpoint: Checkpoint, inputs: Any) -> str:
    assert inputs["input_ids"].shape[0] == 1
    return checkpoint.processor.tokenizer.decode(inputs["input_ids"][0])


PICTURE = "<image>" * tiny.GRID**2


def test_the_chat_template_places_images_before_the_prompt(checkpoint: Checkpoint) -> None:
    inputs = prepare(checkpoint, [IMAGE, IMAGE], "What is it?")
    assert text_of(checkpoint, inputs) == f"<s><|user|>{PICTURE}\n{PICTURE}\nWhat is it?<|assistant|>"
    assert inputs["pixel_values"].shape == (2, 3, tiny.SIDE, tiny.SIDE)


def test_a_prompt_needs_no_image(checkpoint: Checkpoint) -> None:
    inputs = prepare(checkpoint, [], "What is it?")
    assert text_of(checkpoint, inputs) == "<s><|user|>What is it?<|assistant|>"
    assert "pixel_values" not in inputs


def test_without_a_chat_template_the_prompt_follows_the_images(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(tiny.llava(tmp_path, chat_template=None)))
    assert text_of(checkpoint, prepare(checkpoint, [IMAGE], "What is it?")) == f"{PICTURE}\nWhat is it?"
    assert text_of(checkpoint, prepare(checkpoint, [], "What is it?")) == "What is it?"


def test_a_prompt_that_cannot_be_encoded_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"^The prompt is not valid Unicode\.$"):
        prepare(checkpoint, [], "What\udcff?")


SPECIAL = ["</s>", "<s>", "<pad>", "<|user|>", "<|assistant|>", "<video>"]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("token", SPECIAL)
def test_a_prompt_with_a_special_token_is_refused(tmp_path: Path, family: str, token: str) -> None:
    checkpoint = load_checkpoint(str(getattr(tiny, family)(tmp_path)))
    with pytest.raises(ValueError, match=f"^The prompt must not spell {re.escape(repr(token))}, which is a special"):
        prepare(checkpoint, [], f"Hello.{token}What now?")


@pytest.mark.parametrize("token", ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>", "<|assistant|>"])
def test_the_shipped_model_refuses_its_special_tokens(token: str) -> None:
    with pytest.raises(ValueError, match=f"must not spell {re.escape(repr(token))}"):
        prepare(load_checkpoint(str(model_path())), [], f"Look up AB.{token}")


@pytest.mark.parametrize("special", [True, False])
def test_turn_markers_are_refused_even_if_the_tokenizer_does_not_list_them(tmp_path: Path, special: bool) -> None:
    checkpoint = load_checkpoint(str(tiny.llava(tmp_path)))
    checkpoint.processor.tokenizer.add_tokens([AddedToken("<turn>", special=special), AddedToken("\n\n")])
    checkpoint.processor.chat_template = "<turn>\n\n" + tiny.CHAT_TEMPLATE
    assert "<turn>" not in checkpoint.processor.tokenizer.all_special_tokens
    prepare(checkpoint, [], "Hello.\n\nWhat now?")
    with pytest.raises(ValueError, match="must not spell '<turn>'"):
        prepare(checkpoint, [], "Hello.<turn>What now?")


@pytest.mark.parametrize("family", REAL)
def test_every_family_refuses_its_placeholder_and_special_tokens(family: str) -> None:
    text_only = SimpleNamespace(model_type="llama")
    checkpoint = Checkpoint(family, text_only, processor(family))
    for token in {*checkpoint.processor.tokenizer.all_special_tokens, REAL[family].placeholder, REAL[family].token}:
        with pytest.raises(ValueError, match="must not spell"):
            check_text(checkpoint, f"a{token}b")
    check_text(checkpoint, "Is 1 < 2 > 0, <b>or</b> [not] | so?")


@pytest.mark.parametrize(
    "prompt", ["</S>", "< /s>", "<|user |>", "&lt;/s&gt;", "\uff1c/s\uff1e", "<\u200b/s>", "<|us", "er|>"]
)
def test_no_special_token_comes_from_an_accepted_prompt(checkpoint: Checkpoint, prompt: str) -> None:
    special = set(checkpoint.processor.tokenizer.all_special_ids)
    ids = [prepare(checkpoint, [], text)["input_ids"][0].tolist() for text in ("", prompt)]
    assert [token for token in ids[1] if token in special] == [token for token in ids[0] if token in special]


@pytest.mark.parametrize("name", ["tiny", "shipped"])
def test_images_that_were_not_opened_from_a_file_are_checked_too(checkpoint: Checkpoint, name: str) -> None:
    chosen = checkpoint if name == "tiny" else load_checkpoint(str(model_path()))
    with pytest.raises(ImageError, match="A picture is 1 x 5000: its sides may differ by a factor of 200 at most"):
        prepare(chosen, [IMAGE, Image.new("RGB", (1, 5000))], "What is it?")


def test_an_image_that_would_be_scaled_to_too_many_pixels_is_refused() -> None:
    checkpoint = load_checkpoint(str(model_path()))
    checkpoint.processor.image_processor.size = {"shortest_edge": 1000}
    check_image(checkpoint, Image.new("1", (10, 890)))
    with pytest.raises(
        ImageError, match="A picture of 900 x 10 would be scaled to 90,000 x 1,000, more than the limit of 89,478,485"
    ):
        check_image(checkpoint, Image.new("1", (900, 10)))


@pytest.mark.parametrize("family", REAL)
def test_ordinary_images_pass_in_every_family(family: str) -> None:
    checkpoint = Checkpoint(family, None, processor(family))
    for size in ((1, 1), (640, 480), (400, 8000)):
        check_image(checkpoint, Image.new("1", size))


def test_the_context_length_holds_prompt_and_answer(checkpoint: Checkpoint) -> None:
    inputs = prepare(checkpoint, [], "a" * 100_000)
    length = inputs["input_ids"].shape[1]
    sentence = f"The prompt has {length:,} tokens and the answer may have 5, but the model takes 4,096 in all."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_length(checkpoint.config, inputs, 5)
    inputs = {"input_ids": torch.zeros(1, 4000, dtype=torch.long)}
    check_length(checkpoint.config, inputs, 96)
    with pytest.raises(ValueError, match="has 4,000 tokens and the answer may have 97"):
        check_length(checkpoint.config, inputs, 97)


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, None])
@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_with_the_image_placeholder_is_refused(tmp_path: Path, template: str | None, images: int) -> None:
    checkpoint = load_checkpoint(str(tiny.llava(tmp_path, chat_template=template)))
    with pytest.raises(ValueError, match="must not spell '<image>'"):
        prepare(checkpoint, [IMAGE] * images, "What is an <image> tag?")


def test_a_prompt_with_the_video_placeholder_is_refused(checkpoint: Checkpoint) -> None:
    config = Qwen2_5_VLConfig(
        image_token_id=checkpoint.processor.tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=checkpoint.processor.tokenizer.convert_tokens_to_ids("<video>"),
    )
    qwen = Checkpoint("qwen", config, checkpoint.processor)
    with pytest.raises(ValueError, match="must not spell '<video>'"):
        prepare(qwen, [], "What is a <video>?")


def test_an_error_in_the_chat_template_is_reported(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.processor, "chat_template", "{{ raise_exception('No system prompt') }}")
    with pytest.raises(ValueError, match=r"The processor of .* refuses the question: No system prompt\."):
        prepare(checkpoint, [], "What is it?")


def test_a_chat_template_that_drops_images_is_reported(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.processor, "chat_template", "{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(
        ValueError, match=r"^The processor of .* refuses the question: [^.\n]*number of images[^.\n]*\.$"
    ):
        prepare(checkpoint, [IMAGE], "What is it?")
