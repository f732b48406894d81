"""Tiny random models of each family, and prompts for them."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

VOCABULARY = 120
IMAGE_TOKEN = 110
VIDEO_TOKEN = 111
VISION_START = 112
PAD = 0
HEADS = {"1:1": (4, 4), "1:2": (4, 2), "1:8": (8, 1)}


@dataclass(frozen=True)
class Prompt:
    """One prompt: how many images it has, and how many text tokens come before and after them."""

    images: int
    before: int
    after: int


ONE_IMAGE = Prompt(images=1, before=5, after=9)
THREE_IMAGES = Prompt(images=3, before=2, after=12)
NO_TEXT_AFTER = Prompt(images=1, before=7, after=0)
NO_IMAGE = Prompt(images=0, before=11, after=12)


def text_config(heads: str, layers: int = 3) -> dict[str, Any]:
    query_heads, kv_heads = HEADS[heads]
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCABULARY,
        # Large weights make attention as peaked, and layers as different, as trained ones do.
        "initializer_range": 0.25,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def vision_config() -> dict[str, Any]:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        initializer_range=0.3,
    ).to_dict()


def _llava(heads: str) -> PreTrainedModel:
    text = LlamaConfig(**text_config(heads)).to_dict()
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision_config(), text_config=text, image_token_index=IMAGE_TOKEN)
    )


def _llava_next(heads: str) -> PreTrainedModel:
    text = LlamaConfig(**text_config(heads)).to_dict()
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision_config(),
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=[[28, 56], [56, 28]],
        )
    )


def _qwen2_5_vl(heads: str) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3] if heads != "1:8" else [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 7,
        "window_size": 28,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text_config(heads), "rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN,
            vision_start_token_id=VISION_START,
        )
    )


def _llama(heads: str) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**text_config(heads)))


BUILDERS = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen2_5_vl, "llama": _llama}
FAMILIES = ("llava", "llava_next", "qwen2_5_vl")


@cache
def model(family: str, heads: str = "1:2", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(3)
    built = BUILDERS[family](heads).to(dtype).eval()
    built.generation_config.eos_token_id = None
    built.generation_config.pad_token_id = PAD
    return built


def fresh_model(family: str, heads: str = "1:2") -> PreTrainedModel:
    """A model of its own, for tests that look at what a model keeps."""
    return model.__wrapped__(family, heads)


def _images(
    family: str, count: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[int]]:
    """Pixel inputs of ``count`` images, and the number of tokens of each."""
    if family == "llava":
        return {"pixel_values": torch.randn(count, 3, 28, 28, generator=generator, dtype=dtype)}, [16] * count
    if family == "llava_next":
        pixels = torch.randn(count, 3, 3, 28, 28, generator=generator, dtype=dtype)
        # 28 x 56 pixels: a base tile of 4 x 4 patches, and two tiles side by side whose 4 rows end in a newline token.
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[28, 56]] * count)}, [16 + 4 * 9] * count
    grid = torch.tensor([[1, 4, 8]] * count)
    pixels = torch.randn(count * 32, 3 * 2 * 7 * 7, generator=generator, dtype=dtype)
    return {"pixel_values": pixels, "image_grid_thw": grid}, [8] * count


def inputs(family: str, *prompts: Prompt, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a processor returns for a batch of prompts, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    rows, pixel_inputs = [], []
    for prompt in prompts:
        pixels, lengths = _images(family, prompt.images, generator, dtype) if prompt.images else ({}, [])
        row = torch.randint(1, 100, (prompt.before,), generator=generator).tolist()
        for length in lengths:
            row += [VISION_START, *[IMAGE_TOKEN] * length]
        row += torch.randint(1, 100, (prompt.after,), generator=generator).tolist()
        rows.append(row)
        if pixels:
            pixel_inputs.append(pixels)
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "qwen2_5_vl":
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    if pixel_inputs:
        batch |= {name: torch.cat([pixels[name] for pixels in pixel_inputs]) for name in pixel_inputs[0]}
    return batch


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int, **options: Any) -> Tensor:
    """New tokens, greedy unless the options say otherwise, ``[B, tokens]``."""
    options = {"do_sample": False, **options}
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def logits(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int, **options: Any) -> tuple[Tensor, ...]:
    """Logits ``[B, vocabulary]`` of each greedily generated token."""
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    ).logits
