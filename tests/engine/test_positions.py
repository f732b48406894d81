"""Explicit positions: those that the model would compute, in the prompt and in every decode step."""

import pytest
import torch
from transformers import DynamicCache

from sparsight.engine.positions import decode_positions, prompt_positions
from tests.support import models
from tests.support.families import TINY
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, ONE_VIDEO, TEXT_ONLY, THREE_IMAGES

PROMPTS = {"one image": ONE_IMAGE, "three images": THREE_IMAGES, "no image": NO_IMAGE, "video": ONE_VIDEO}
CASES = [(name, prompt) for name, tiny in TINY.items() for prompt in PROMPTS if prompt != "video" or tiny.video]
CASES += [(name, "no image") for name in TEXT_ONLY]
MULTIMODAL_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")


def steps(model, inputs, count):
    """Greedy tokens ``[1, count]`` with explicit positions."""
    position_ids, position = prompt_positions(model, inputs)
    cache = DynamicCache(config=model.config)
    logits = model(**inputs, position_ids=position_ids, past_key_values=cache).logits
    tokens = [logits[:, -1].argmax(-1, keepdim=True)]
    for step in range(count - 1):
        positions = decode_positions(model, torch.tensor([position + step]))
        logits = model(input_ids=tokens[-1], position_ids=positions, past_key_values=cache).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)


@pytest.mark.parametrize(("name", "prompt"), CASES)
@torch.no_grad()
def test_prompt_and_decode_steps_are_those_of_generate(name, prompt):
    model, inputs = models.model(name), models.inputs(name, PROMPTS[prompt])
    expected, logits = models.generate(model, inputs, 6), model(**inputs).logits
    # What the model remembers of another prompt must not matter.
    model(**models.inputs(name, THREE_IMAGES if name in TINY else NO_IMAGE, seed=9))
    assert torch.equal(model(**inputs, position_ids=prompt_positions(model, inputs)[0]).logits, logits)
    assert torch.equal(steps(model, inputs, 6), expected)


@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
@torch.no_grad()
def test_after_an_image_without_text_the_positions_are_those_of_the_models_offset(name):
    model, inputs = models.model(name), models.inputs(name, NO_TEXT_AFTER)
    cache = DynamicCache(config=model.config)
    tokens = [model(**inputs, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(5):
        logits = model(input_ids=tokens[-1], past_key_values=cache).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(steps(model, inputs, 6), torch.cat(tokens, 1))


@torch.no_grad()
def test_a_long_video_is_followed_by_the_position_after_the_last_text_token():
    model = models.model("qwen2_5_vl")
    inputs = models.inputs("qwen2_5_vl", ONE_VIDEO) | {"second_per_grid_ts": torch.tensor([20.0])}
    position_ids, position = prompt_positions(model, inputs)
    assert position_ids.max() >= position == position_ids[0, 0, -1] + 1
    assert torch.equal(steps(model, inputs, 6), models.generate(model, inputs, 6))


@pytest.mark.parametrize("name", [*TINY, *TEXT_ONLY])
def test_positions_of_text_count_tokens(name):
    model, inputs = models.model(name), models.inputs(name, NO_IMAGE)
    first = 1 if name == "paligemma" else 0
    position_ids, position = prompt_positions(model, inputs)
    axes = (3,) if name in MULTIMODAL_ROPE else ()
    assert torch.equal(position_ids, torch.arange(first, first + 23).expand(*axes, 1, 23))
    assert position == first + 23
    assert torch.equal(decode_positions(model, torch.tensor([7, 4])), torch.tensor([[7], [4]]).expand(*axes, 2, 1))


@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
def test_an_image_takes_as_many_positions_as_its_longer_side(name):
    model, inputs = models.model(name), models.inputs(name, ONE_IMAGE)
    position_ids, position = prompt_positions(model, inputs)
    # Five tokens and the one that opens the image come before its 2 x 4 merged patches, nine tokens after them.
    assert position_ids[:, 0, 6:14].tolist() == [[6] * 8, [6] * 4 + [7] * 4, [6, 7, 8, 9] * 2]
    assert position_ids[:, 0, 14:].tolist() == [list(range(10, 19))] * 3
    assert position == 19


def test_several_prompts_padding_and_missing_types_are_refused():
    model = models.model("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"one prompt without padding, got input_ids \[2, 23\]"):
        prompt_positions(model, models.inputs("qwen2_5_vl", ONE_IMAGE, NO_IMAGE))
    inputs = models.inputs("qwen2_5_vl", ONE_IMAGE)
    padded = inputs | {"attention_mask": torch.cat([torch.zeros(1, 1), torch.ones(1, 22)], dim=1)}
    with pytest.raises(ValueError, match="one prompt without padding"):
        prompt_positions(model, padded)
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="need mm_token_type_ids, which the processor returns"):
        prompt_positions(model, inputs)
