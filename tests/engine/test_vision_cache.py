"""Vision features from the cache are those that the model computes, and the tower does not run again."""

from concurrent.futures import ThreadPoolExecutor
from functools import wraps

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from sparsight.engine.positions import prompt_positions
from sparsight.engine.vision_cache import VisionCache, slice_features
from sparsight.models.families import FAMILIES
from tests.support import models
from tests.support.families import TINY
from tests.support.models import NO_IMAGE, ONE_IMAGE, ONE_VIDEO, TEXT_ONLY, THREE_IMAGES, Prompt

IMAGE_AND_VIDEO = Prompt(images=1, before=3, after=6, videos=1)
PROMPTS = {
    "one image": ONE_IMAGE,
    "three images": THREE_IMAGES,
    "video": ONE_VIDEO,
    "image and video": IMAGE_AND_VIDEO,
}
# glm4v uses image tokens for video frames, and transformers refuses prompts with both.
CASES = [
    (name, prompt)
    for name, tiny in TINY.items()
    for prompt in PROMPTS
    if "video" not in prompt or (tiny.video and (name, prompt) != ("glm4v", "image and video"))
]
TILES = {"internvl": 3, "aya_vision": 3, "ovis2": 3, "idefics3": 3, "smolvlm": 3, "minicpmv4_6": 2}
"""Tiles of an image that are encoded independently."""


@pytest.fixture
def towers(monkeypatch):
    """A function that counts how often a model's vision tower runs from now on."""

    def count(model):
        calls = []
        for name in ("get_image_features", "get_video_features"):
            if encoder := getattr(model.base_model, name, None):

                @wraps(encoder)
                def counted(*args, encoder=encoder, **options):
                    calls.append(options)
                    return encoder(*args, **options)

                monkeypatch.setattr(model.base_model, name, counted)
        return calls

    return count


@pytest.mark.parametrize(("name", "prompt"), CASES)
@torch.no_grad()
def test_logits_with_features_are_those_with_pixels_bit_for_bit(name, prompt, towers):
    model, inputs = models.model(name), models.inputs(name, PROMPTS[prompt])
    positions, _ = prompt_positions(model, inputs)
    expected = model(**inputs, position_ids=positions).logits
    cache = VisionCache(model, 10**9)
    first = cache.encode(inputs)
    calls = towers(model)
    second = cache.encode(inputs)
    for features in (first, second):
        assert not any(key.startswith("pixel") for key in features)
        assert torch.equal(model(**features, position_ids=positions).logits, expected)
    assert calls == []


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_an_image_of_another_prompt_is_not_encoded_again(name, towers):
    model, inputs = models.model(name), models.inputs(name, THREE_IMAGES)
    positions, _ = prompt_positions(model, inputs)
    cache, tiles = VisionCache(model, 10**9), TILES.get(name, 1)
    # Prompts of the same seed begin with the same image.
    cache.encode(models.inputs(name, ONE_IMAGE))
    assert len(cache) == tiles
    calls = towers(model)
    features = cache.encode(inputs)
    assert len(cache) == 3 * tiles and len(calls) == 1
    assert_close(model(**features, position_ids=positions).logits, model(**inputs, position_ids=positions).logits)
    tokens = int(torch.isin(inputs["input_ids"], torch.tensor(FAMILIES[name].token_ids(model.config))).sum())
    layers = 3 if name.startswith("qwen3_vl") else 1
    assert cache.nbytes == tokens * 64 * 4 * layers


@pytest.mark.parametrize(("name", "prompt"), CASES)
@torch.no_grad()
def test_chunks_of_a_prompt_take_the_features_of_their_tokens(name, prompt):
    model, inputs = models.model(name), models.inputs(name, PROMPTS[prompt])
    positions, _ = prompt_positions(model, inputs)
    encoded, ids = VisionCache(model, 10**9).encode(inputs)["mm_encoder_outputs"], inputs["input_ids"]
    chunk = 7 if FAMILIES[name].chunked_prefill else ids.shape[1]
    types = {key: value for key, value in inputs.items() if key == "token_type_ids"}
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], chunk):
        stop = min(start + chunk, ids.shape[1])
        output = model(
            input_ids=ids[:, start:stop],
            position_ids=positions[..., start:stop],
            mm_encoder_outputs=slice_features(model.config, encoded, ids, start, stop),
            past_key_values=cache,
            **types,
        )
        logits.append(output.logits)
    expected = model(**inputs, position_ids=positions).logits
    assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*TINY, *TEXT_ONLY])
def test_a_prompt_without_images_stays_as_it_is(name):
    inputs = models.inputs(name, NO_IMAGE)
    assert VisionCache(models.model(name), 1000).encode(inputs) == inputs


def test_several_images_that_share_a_layout_belong_together():
    """Llava-OneVision cuts an image into tiles where it is the only one, and not beside others."""
    model = models.model("llava_onevision")
    inputs = models.inputs("llava_onevision", THREE_IMAGES)
    cache = VisionCache(model, 10**9)
    cache.encode(inputs | {"batch_num_images": torch.tensor([3])})
    assert len(cache) == 1
    cache.encode(inputs)
    assert len(cache) == 4


@torch.no_grad()
def test_images_whose_features_come_in_one_piece_are_encoded_one_by_one(monkeypatch, towers):
    model, inputs = models.model("qwen2_vl"), models.inputs("qwen2_vl", THREE_IMAGES)
    positions, _ = prompt_positions(model, inputs)
    expected = model(**inputs, position_ids=positions).logits
    encoder = model.base_model.get_image_features

    @wraps(encoder)
    def in_one_piece(*args, **options):
        output = encoder(*args, **options)
        output.pooler_output = (torch.cat(output.pooler_output),)
        return output

    monkeypatch.setattr(model.base_model, "get_image_features", in_one_piece)
    calls, cache = towers(model), VisionCache(model, 10**9)
    features = cache.encode(inputs)
    assert len(cache) == 3 and len(calls) == 4
    assert_close(model(**features, position_ids=positions).logits, expected)


def test_what_an_encoding_depends_on_is_in_the_key():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = VisionCache(model, 10**9)
    pixels = inputs["pixel_values"]
    changed = pixels.clone()
    changed[0, 0, 0, 0] += 1e-3
    for number, other in enumerate([pixels, changed, pixels.double(), pixels.flip(-1)], start=1):
        for _ in range(2):
            cache.encode(inputs | {"pixel_values": other})
            assert len(cache) == number
    cache.encode(inputs | {"vision_feature_layer": -1})
    assert len(cache) == 5


def test_images_of_another_salt_are_encoded_again(towers):
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache, calls = VisionCache(model, 10**9), towers(model)
    for salt, encoded in (("one", 1), ("other", 2), ("one", 2), ("other", 2)):
        cache.encode(inputs, cache.media(inputs, salt))
        assert len(calls) == encoded


def test_the_least_recently_used_image_leaves_when_the_bytes_are_spent(towers):
    model = models.model("llava")
    prompts = [models.inputs("llava", ONE_IMAGE, seed=seed) for seed in range(4)]
    size = 16 * 64 * 4
    cache = VisionCache(model, 2 * size)
    calls = towers(model)
    for seed, encodings in [(0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4), (0, 4), (2, 5)]:
        cache.encode(prompts[seed])
        assert len(calls) == encodings
        assert cache.nbytes == size * len(cache) <= 2 * size
    small = VisionCache(model, size - 1)
    small.encode(prompts[0])
    assert len(small) == small.nbytes == 0


def test_features_are_copies_that_keep_no_other_images_alive():
    model, inputs = models.model("qwen3_vl"), models.inputs("qwen3_vl", THREE_IMAGES)
    cache = VisionCache(model, 10**9)
    cache.encode(inputs)
    for entry in cache._entries.values():
        assert all(layer.untyped_storage().nbytes() == layer.nbytes for layer in entry.layers)


def test_threads_share_a_cache():
    model = models.model("llava")
    prompts = [models.inputs("llava", ONE_IMAGE, seed=seed) for seed in range(6)]
    expected = [VisionCache(model, 0).encode(each)["mm_encoder_outputs"]["image"].pooler_output[0] for each in prompts]
    cache = VisionCache(model, 3 * 16 * 64 * 4)

    def encode(index):
        return cache.encode(prompts[index])["mm_encoder_outputs"]["image"].pooler_output[0]

    order = [(7 * step) % 6 if step % 2 else step % 3 for step in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for index, features in zip(order, pool.map(encode, order), strict=True):
            assert torch.equal(features, expected[index])
    assert len(cache) == 3 and cache.nbytes == 3 * 16 * 64 * 4
