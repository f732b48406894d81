"""Tiny random models, prompts for them, and plain generation."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.families import PAD, TINY, VISION_START, head_dim, text_config


@dataclass(frozen=True)
class Prompt:
    """One prompt: how many images and videos it has, and how many text tokens come before and after them."""

    images: int
    before: int
    after: int
    videos: int = 0


ONE_IMAGE = Prompt(images=1, before=5, after=9)
THREE_IMAGES = Prompt(images=3, before=2, after=12)
NO_TEXT_AFTER = Prompt(images=1, before=7, after=0)
NO_IMAGE = Prompt(images=0, before=11, after=12)
ONE_VIDEO = Prompt(images=0, before=5, after=9, videos=1)

BUILDERS = {
    **{name: tiny.build for name, tiny in TINY.items()},
    "llama": lambda heads: LlamaForCausalLM(LlamaConfig(**text_config(heads))),
    "qwen3": lambda heads: Qwen3ForCausalLM(Qwen3Config(**text_config(heads), head_dim=head_dim(heads))),
    "mistral": lambda heads: MistralForCausalLM(MistralConfig(**text_config(heads), sliding_window=None)),
}
FAMILIES = ("llava", "llava_next", "qwen2_5_vl")
"""One family of each kind: one grid, tiles, any size with positions in three dimensions. The matrix has them all."""

TEXT_ONLY = ("llama", "qwen3", "mistral")


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


def inputs(family: str, *prompts: Prompt, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a processor returns for a batch of prompts, padded on the left.

    The prompt with index ``i`` is drawn from ``seed + i``, so that each can be had alone.
    """
    tiny = TINY.get(family)
    rows, pixels = [], []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + index)
        media = [tiny.image(generator, dtype) for _ in range(prompt.images)]
        media += [tiny.video(generator, dtype) for _ in range(prompt.videos)]
        row = [(token, 0) for token in torch.randint(1, 90, (prompt.before,), generator=generator).tolist()]
        for medium in media:
            row += [(VISION_START, 0), *zip(medium.ids, medium.types, strict=True)]
        row += [(token, 0) for token in torch.randint(1, 90, (prompt.after,), generator=generator).tolist()]
        rows.append(row)
        pixels.append([medium.pixels for medium in media])
    longest = max(map(len, rows))
    ids, types = torch.tensor([[(PAD, 0)] * (longest - len(row)) + row for row in rows]).unbind(-1)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if tiny is None:
        return batch
    batch |= {name: make(ids, types) for name, make in tiny.token_types.items()}
    # A sequence may have pictures, another one videos.
    kinds = {tuple(each) for row in pixels for each in row}
    for kind in sorted(kinds):
        batch |= tiny.collate([[each for each in row if tuple(each) == kind] for row in pixels])
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
