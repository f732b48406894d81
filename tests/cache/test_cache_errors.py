"""What CompressedCache refuses, each in one clear sentence."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from sparsight import CompressedCache, VLCache
from tests.support import families, models
from tests.support.models import NO_IMAGE, ONE_IMAGE, THREE_IMAGES, generate


def compressed(model, inputs, recipe=None):
    return CompressedCache(model, recipe or VLCache(budget=0.1), inputs)


def test_a_model_without_a_language_part():
    clip = CLIPModel(CLIPConfig(vision_config=families.vision_config()))
    with pytest.raises(ValueError, match="CLIPModel has no language part"):
        compressed(clip, models.inputs("llava", ONE_IMAGE))


def test_a_model_whose_layers_are_all_bounded():
    config = MistralConfig(**families.text_config("1:2"), sliding_window=16)
    with pytest.raises(ValueError, match="no layer to compress"):
        compressed(MistralForCausalLM(config), models.inputs("llama", NO_IMAGE))


def test_an_attention_implementation_that_is_not_supported():
    model = models.fresh_model("llava")
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(ValueError, match="'flex_attention' is not supported"):
        compressed(model, models.inputs("llava", ONE_IMAGE))


def test_a_name_in_place_of_a_recipe():
    with pytest.raises(ValueError, match="recipe must be a Recipe"):
        compressed(models.model("llava"), models.inputs("llava", ONE_IMAGE), "vl-cache")


@pytest.mark.parametrize("other", ["llava_next", "qwen2_5_vl"])
def test_a_cache_used_with_another_model(other):
    cache = compressed(models.model("llava"), models.inputs("llava", NO_IMAGE))
    with pytest.raises(ValueError, match="made for a LlavaForConditionalGeneration"):
        generate(models.model(other), models.inputs(other, NO_IMAGE), 4, past_key_values=cache)


def test_a_cache_used_with_another_model_that_has_one_too():
    mine = models.inputs("llava", ONE_IMAGE)
    cache = compressed(models.model("llava"), mine)
    other = compressed(models.model("llava", "1:8"), mine)
    with pytest.raises(ValueError, match="another model or another attention"):
        generate(models.model("llava", "1:8"), mine, 4, past_key_values=cache)
    assert other.get_seq_length() == 0


def test_inputs_of_another_batch_size():
    model = models.model("llava")
    cache = compressed(model, models.inputs("llava", ONE_IMAGE, ONE_IMAGE))
    with pytest.raises(ValueError, match="inputs of 2 sequences, but the model was given 1"):
        generate(model, models.inputs("llava", ONE_IMAGE), 4, past_key_values=cache)


def test_inputs_that_are_shorter_than_the_caches():
    model = models.model("llava")
    cache = compressed(model, models.inputs("llava", THREE_IMAGES))
    with pytest.raises(ValueError, match="inputs of 65 tokens, but the model was given 31"):
        generate(model, models.inputs("llava", ONE_IMAGE), 4, past_key_values=cache)


def test_inputs_that_are_longer_than_the_caches():
    model = models.model("llava")
    cache = compressed(model, models.inputs("llava", ONE_IMAGE))
    with pytest.raises(ValueError, match="inputs of 31 tokens, but the model was given 65"):
        generate(model, models.inputs("llava", THREE_IMAGES), 4, past_key_values=cache)


def test_attention_that_the_statistics_do_not_know():
    config = Gemma2Config(**families.text_config("1:2"), head_dim=16, layer_types=["full_attention"] * 3)
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    inputs = models.inputs("llama", NO_IMAGE)
    with pytest.raises(ValueError, match="attends with 'softcap'"):
        generate(model, inputs, 2, past_key_values=compressed(model, inputs))


def test_inputs_that_are_padded_otherwise():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    cache = compressed(model, {**inputs, **{k: inputs[k].flip(0) for k in ("input_ids", "attention_mask")}})
    with pytest.raises(ValueError, match="padded otherwise"):
        generate(model, inputs, 4, past_key_values=cache)
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with pytest.raises(ValueError, match="padded otherwise"):
        generate(model, inputs, 4, past_key_values=compressed(model, without))


def test_a_cache_serves_its_own_model_after_another_was_refused():
    model, inputs = models.model("llava"), models.inputs("llava", NO_IMAGE)
    cache = compressed(model, inputs)
    with pytest.raises(ValueError, match="another model"):
        generate(models.model("llama"), inputs, 4, past_key_values=cache)
    assert generate(model, inputs, 4, past_key_values=cache).shape == (1, 4)


def test_rows_cannot_be_reordered_in_the_middle_of_a_prompt():
    model, inputs = models.model("llama"), models.inputs("llama", NO_IMAGE, NO_IMAGE)
    cache = compressed(model, inputs)
    model(input_ids=inputs["input_ids"][:, :7], past_key_values=cache)
    with pytest.raises(ValueError, match="before the prompt is complete"):
        cache.reorder_cache(torch.tensor([1, 0]))


def test_crop_to_a_length():
    with pytest.raises(ValueError, match="negative number, got 5"):
        compressed(models.model("llava"), models.inputs("llava", ONE_IMAGE)).crop(5)


def test_attention_that_is_not_a_number():
    model = models.fresh_model("llama")
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    inputs = models.inputs("llama", NO_IMAGE)
    with pytest.raises(ValueError, match=r"holds NaN, in torch.float32"):
        generate(model, inputs, 2, past_key_values=compressed(model, inputs))


def test_another_batch_size_while_decoding():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = compressed(model, inputs)
    generate(model, inputs, 2, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 1 sequences, but the model was given 2"):
        model(input_ids=torch.tensor([[3], [4]]), past_key_values=cache)
