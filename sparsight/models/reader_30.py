"""``reader-30``: SmolLM2 taught to read pages, through the vision tower of the small reader.

What was trained ships with the package: low-rank updates of SmolLM2's linear layers and a projector. Together with the
installed SmolLM2 they make a LLaVA checkpoint.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from sparsight.reader import model_path

IMAGE_TOKEN = "<image>"
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""The linear layers of a decoder layer."""

CAPITALS = " ?[A-Z](?![a-z])"
"""Capitals that do not begin a word are tokens of their own, as digits are: the keys of records are spelled."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own format, without its system prompt."""


def weights_path() -> Path:
    """The file with the low-rank updates and the projector."""
    return Path(str(files("sparsight.reader") / "smollm2.safetensors"))


def spelling_tokenizer(folder: Path) -> Any:
    """A SmolLM2 checkpoint's tokenizer with one more rule, :data:`CAPITALS`, and a token for patches."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    engine = tokenizer.backend_tokenizer
    split = pre_tokenizers.Split(Regex(CAPITALS), behavior="isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, engine.pre_tokenizer])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


@torch.no_grad()
def assemble(base: Path, tokenizer: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """Put the model together, in float32.

    Args:
        base: the language model's checkpoint folder.
        tokenizer: its tokenizer, with :data:`IMAGE_TOKEN`.
        weights: the projector's parameters, `projector.*`, and of each linear layer the factors of its update,
            `layers.0.mlp.up_proj.down` of shape `[rank, inputs]` and `.up` of shape `[outputs, rank]`, and so on.
    """
    language: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reader: Any = AutoModelForImageTextToText.from_pretrained(model_path(), dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for number, layer in enumerate(language.model.layers):
        for name in LINEARS:
            down, up = (weights[f"layers.{number}.{name}.{factor}"].float() for factor in ("down", "up"))
            layer.get_submodule(name).weight.add_(up @ down)
    config = LlavaConfig(
        vision_config=reader.config.vision_config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=reader.config.vision_feature_layer,
        vision_feature_select_strategy=reader.config.vision_feature_select_strategy,
        image_seq_length=reader.config.image_seq_length,
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config)
    parts = model.model
    parts.language_model.load_state_dict(language.model.state_dict())
    parts.vision_tower.load_state_dict(reader.model.vision_tower.state_dict())
    prefix = "projector."
    projector = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    parts.multi_modal_projector.load_state_dict(projector)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=300,
    )
    return model.eval()


def write(base: Path, folder: Path) -> None:
    """Write the checkpoint folder, in bf16, on the installed SmolLM2 in `base`."""
    tokenizer = spelling_tokenizer(base)
    model = assemble(base, tokenizer, load_file(weights_path()))
    model.to(torch.bfloat16).save_pretrained(folder)
    reader: Any = AutoProcessor.from_pretrained(model_path())
    LlavaProcessor(
        image_processor=reader.image_processor,
        tokenizer=tokenizer,
        patch_size=reader.patch_size,
        vision_feature_select_strategy=reader.vision_feature_select_strategy,
        num_additional_image_tokens=reader.num_additional_image_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
