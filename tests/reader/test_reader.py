"""The shipped model loads like any checkpoint and answers from the image that it is given."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.reader import model_path
from sparsight.reader.skills import Example, look_at, look_up, read_out
from training.evaluate import answers, edits, judge
from training.model import see

LIMIT = 24 * 2**20
PAGES = 12


@pytest.fixture(scope="module")
def reader():
    """Model and processor."""
    model = AutoModelForImageTextToText.from_pretrained(model_path()).eval()
    return model, AutoProcessor.from_pretrained(model_path())


@pytest.fixture(scope="module")
def pages():
    """Held-out pages of 16 records with a question each."""
    return [look_up(np.random.default_rng([99, seed]), "heldout", 16) for seed in range(PAGES)]


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in Path(model_path()).iterdir()) <= LIMIT


def test_it_is_a_llava_of_the_documented_shape(reader):
    model, _ = reader
    text, vision = model.config.text_config, model.config.vision_config
    assert model.config.model_type == "llava"
    assert text.num_hidden_layers >= 6 and vision.num_hidden_layers >= 4
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    assert (vision.image_size, vision.patch_size) == (336, 14)


def test_an_image_becomes_576_tokens(reader, pages):
    model, processor = reader
    content = [{"type": "image", "image": pages[0].pictures()[0]}, {"type": "text", "text": "Read the page."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert np.count_nonzero(np.array(inputs["input_ids"]) == model.config.image_token_id) == 576


def test_look_up_is_right(reader, pages):
    right = sum(example[0] for example in judge(*reader, pages))
    assert right >= PAGES - 1


def test_generating_agrees_with_judging(reader, pages):
    said = answers(*reader, pages[:4], limit=6)
    verdicts = [example[0] for example in judge(*reader, pages[:4])]
    assert [text == example.turns[0][1] for text, example in zip(said, pages, strict=False)] == verdicts


def test_with_another_page_look_up_falls_to_chance(reader, pages):
    strangers = [replace(page, images=other.images) for page, other in zip(pages, pages[1:] + pages[:1], strict=True)]
    assert all(isinstance(stranger, Example) for stranger in strangers)
    assert sum(example[0] for example in judge(*reader, strangers)) <= 1


def test_training_computes_the_features_that_the_model_computes(reader, pages):
    model, processor = reader
    pixels = processor.image_processor(pages[0].pictures(), return_tensors="pt")["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        torch.testing.assert_close(features[0].reshape(576, -1), see(model, pixels)[0], atol=0.1, rtol=0.05)


def test_it_names_colours_and_counts_things(reader):
    scenes = [look_at(np.random.default_rng([98, i]), "heldout", kinds=("color", "number")) for i in range(PAGES)]
    assert sum(example[0] for example in judge(*reader, scenes)) >= PAGES - 2


def test_it_transcribes_a_short_list(reader):
    lists = [read_out(np.random.default_rng([97, i]), "heldout", 4) for i in range(6)]
    wanted = [example.turns[0][1] for example in lists]
    said = answers(*reader, lists, limit=60)
    assert sum(edits(a, b) for a, b in zip(said, wanted, strict=True)) <= 0.1 * sum(map(len, wanted))
