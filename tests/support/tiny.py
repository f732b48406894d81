"""Tiny random checkpoints: real configs, weights, tokenizers, processors and chat templates, written to disk."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH = 14
SIDE = 56
GRID = SIDE // PATCH
LAYERS = 3
KV_HEADS = 2
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|user|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that every text has one tokenization of known length."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", "<video>", "<|user|>", "<|assistant|>"],
    )


def text_config(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A Llama-shaped language part with grouped queries."""
    return {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        # Random weights must not end an answer by chance.
        "eos_token_id": None,
    }


def llama(folder: Path) -> Path:
    """A Llama checkpoint without images."""
    words = tokenizer()
    return _save(folder, LlamaForCausalLM, LlamaConfig(**text_config(words)), words)


def vision_config() -> CLIPVisionConfig:
    """A CLIP tower; its first hidden states depend on their own patch only."""
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )


def llava(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, strategy: str = "default") -> Path:
    """A Llava checkpoint, with ``GRID x GRID`` vision tokens per image."""
    words = tokenizer()
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=LlamaConfig(**text_config(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        image_seq_length=GRID * GRID,
    )
    processor = LlavaProcessor(
        LlavaImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False
        ),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    return _save(folder, LlavaForConditionalGeneration, config, processor)


def llava_next(folder: Path, *, strategy: str = "default") -> Path:
    """A LlavaNext checkpoint: a base tile and high-resolution tiles."""
    words = tokenizer()
    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=LlamaConfig(**text_config(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=PINPOINTS,
        ),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return _save(folder, LlavaNextForConditionalGeneration, config, processor)


def qwen2_5_vl(vision_layers: int = 0) -> PreTrainedModel:
    """A Qwen2.5-VL model in memory: its processor needs torchvision, for videos."""
    words = tokenizer()
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": vision_layers,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
        text_config={
            **text_config(words),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen2_5_vl_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2.5-VL's image processor, which needs no torchvision."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})


def clip(folder: Path) -> Path:
    """A checkpoint of a vision tower without a language part."""
    vision = vision_config()
    vision.save_pretrained(folder)
    return folder


def _save(folder: Path, model: type[PreTrainedModel], config: Any, processor: Any) -> Path:
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
