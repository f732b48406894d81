"""The table of model families: its contents, what it refuses, and adding an entry."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    IdeficsConfig,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparsight import CompressedCache, recipe
from sparsight.cache.compressed_cache import CompressedLayer
from sparsight.models.families import FAMILIES, Family, check_chunks, family_of
from sparsight.models.layouts import find_tiles, single_grid
from sparsight.models.prompt import locate
from tests.support import families, models
from tests.support.families import IMAGE_TOKEN, TINY, VIDEO_TOKEN
from tests.support.models import NO_IMAGE, ONE_IMAGE, ONE_VIDEO, THREE_IMAGES


@pytest.mark.parametrize("name", FAMILIES)
def test_an_entry_agrees_with_transformers(name):
    family, model = FAMILIES[name], models.model(name)
    assert family.model_type == name == model.config.model_type
    assert family.model_class == type(model).__name__ == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]
    assert family.token_ids(model.config)[0] == IMAGE_TOKEN
    assert family.video == (TINY[name].video is not None)
    assert family_of(model.config) is family
    cache = CompressedCache(model, recipe("vl-cache"), models.inputs(name, NO_IMAGE))
    alone = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, CompressedLayer)}
    names = {"": set(), "sliding window": {"DynamicSlidingWindowLayer"}, "linear attention": {"LinearAttentionLayer"}}
    assert alone == names[family.uncompressed_layers]


@pytest.mark.parametrize("name", TINY)
def test_vision_tokens_are_found_without_the_processors_type_mask(name):
    inputs = models.inputs(name, THREE_IMAGES, NO_IMAGE, ONE_IMAGE)
    ids = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    mask = locate(models.model(name).config, ids).vision_mask
    assert torch.equal(mask, inputs["input_ids"] == IMAGE_TOKEN)
    assert torch.equal(mask, locate(models.model(name).config, inputs).vision_mask)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.video])
def test_video_frames_are_found_without_the_processors_type_mask(name):
    inputs = models.inputs(name, ONE_VIDEO, NO_IMAGE)
    ids = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    mask = locate(models.model(name).config, ids).vision_mask
    assert mask[0].any()
    assert torch.equal(mask, torch.isin(inputs["input_ids"], torch.tensor([IMAGE_TOKEN, VIDEO_TOKEN])))
    assert torch.equal(mask, locate(models.model(name).config, inputs).vision_mask)


@pytest.mark.parametrize("name", TINY)
def test_prefill_in_chunks_equals_unchunked_prefill_or_is_refused(name):
    model, inputs = models.model(name), models.inputs(name, ONE_IMAGE, THREE_IMAGES, NO_IMAGE)

    def logits(**options):
        cache = CompressedCache(model, recipe("vl-cache", budget=0.2), inputs)
        return torch.stack(models.logits(model, inputs, 8, past_key_values=cache, **options))

    if FAMILIES[name].chunked_prefill:
        check_chunks(model.config)
        assert_close(logits(prefill_chunk_size=9), logits(), rtol=1e-3, atol=1e-3)
        return
    with pytest.raises(ValueError, match=f"'{name}' models cannot prefill in chunks: leave the chunk size out"):
        check_chunks(model.config)
    try:
        assert not torch.allclose(logits(prefill_chunk_size=9), logits(), rtol=1e-3, atol=1e-3)
    except TypeError:
        # Ovis2 wants a picture in every part.
        assert name == "ovis2"


def test_a_config_without_a_video_token():
    config = SimpleNamespace(image_token_id=7, video_token_id=None)
    assert FAMILIES["minicpmv4_6"].token_ids(config) == [7]


def test_a_text_only_model_has_no_family():
    assert family_of(LlamaConfig()) is None


def test_a_family_that_is_not_in_the_table_is_refused():
    config = Cohere2VisionConfig()
    with pytest.raises(
        ValueError,
        match=r"'cohere2_vision' is not in the table of families: known are llava, .*CONTRIBUTING.md shows",
    ):
        locate(config, {"input_ids": torch.ones(1, 3)})


def mllama():
    text = families.text_config("1:2") | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 28,
        "patch_size": 7, "intermediate_size": 48, "vision_output_dim": 64, "intermediate_layers_indices": [0],
    }  # fmt: skip
    return MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    )


def test_cross_attention_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'mllama' is not supported: .* cross-attention layers, .* no vision tokens"):
        CompressedCache(mllama(), recipe("vl-cache"), models.inputs("llama", NO_IMAGE))
    # A processor's token types do not help.
    with pytest.raises(ValueError, match="'idefics' is not supported"):
        locate(IdeficsConfig(), {"input_ids": torch.ones(1, 3), "mm_token_type_ids": torch.zeros(1, 3)})


def cohere2_vision():
    torch.manual_seed(0)
    text = families.text_config("1:2") | {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 8,
        "model_type": "cohere2",
    }
    config = Cohere2VisionConfig(
        vision_config=families.siglip(), text_config=text, image_token_id=IMAGE_TOKEN, alignment_intermediate_size=64
    )
    return Cohere2VisionForConditionalGeneration(config).eval()


def test_the_five_lines_of_contributing_add_a_family(monkeypatch):
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (lines,) = re.findall(r"## Adding a model family\n.*?```python\n(.*?)```", guide, re.DOTALL)
    assert len(lines.splitlines()) <= 5
    # What the lines add is gone after the test.
    monkeypatch.setitem(FAMILIES, "cohere2_vision", Family("", "", single_grid))
    exec(lines, {})
    assert FAMILIES["cohere2_vision"].model_class == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["cohere2_vision"]
    model, inputs = cohere2_vision(), models.inputs("aya_vision", ONE_IMAGE, THREE_IMAGES)
    for name in ("vl-cache", "elastic"):
        cache = CompressedCache(model, recipe(name, budget=1.0), inputs)
        assert torch.equal(models.generate(model, inputs, 8, past_key_values=cache), models.generate(model, inputs, 8))
    assert cache.report().vision_tokens == [12, 36]
    alone = models.inputs("aya_vision", ONE_IMAGE)
    plain = SimpleNamespace(do_normalize=False, do_rescale=True)
    tiles = find_tiles(FAMILIES["cohere2_vision"].layout, model.config, alone, plain)
    assert [tuple(tile.tokens.shape) for tile in tiles] == [(2, 2)] * 3
