"""Language models in the sizes of well-known vision-language models, with random weights: nothing is downloaded."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from sparsight.compression import Reconstruction
from sparsight.compression.recipe import Recipe

FIRST_TEXT_TOKENS, POST_VISION_TOKENS = 36, 64
"""Text tokens of a prompt before and after its image."""


def _sizes(vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2**17,
    }


SHAPES: dict[str, PreTrainedConfig] = {
    "small": LlamaConfig(**_sizes(4096, 512, 1376, 8, 8, 8)),
    "llava-1.5-7b": LlamaConfig(**_sizes(32064, 4096, 11008, 32, 32, 32)),
    "llava-1.5-13b": LlamaConfig(**_sizes(32064, 5120, 13824, 40, 40, 40)),
    "llava-next-mistral-7b": MistralConfig(**_sizes(32064, 4096, 14336, 32, 32, 8), sliding_window=None),
    "llava-next-34b": LlamaConfig(**_sizes(64064, 7168, 20480, 60, 56, 8)),
    "qwen2.5-vl-3b": Qwen2Config(**_sizes(151936, 2048, 11008, 36, 16, 2)),
    "qwen2.5-vl-7b": Qwen2Config(**_sizes(152064, 3584, 18944, 28, 28, 4)),
}
"""Published sizes of each model's language part."""


def parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of a model with this config."""
    with torch.device("meta"):
        return sum(weights.numel() for weights in AutoModelForCausalLM.from_config(config).parameters())


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with this config and random weights, created on the device."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_inputs(model: PreTrainedModel, length: int, batch: int) -> dict[str, Tensor]:
    """Prompts of random tokens, marked as vision except for the first and last ones; ``[batch, length]`` each."""
    types = torch.ones(batch, length, dtype=torch.long)
    types[:, :FIRST_TEXT_TOKENS] = 0
    types[:, -POST_VISION_TOKENS:] = 0
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (batch, length))
    return {"input_ids": tokens.to(model.device), "mm_token_type_ids": types.to(model.device)}


def without_tokenizer(recipe: Recipe) -> Recipe:
    """The recipe for a model without a tokenizer: KVzip's instructions are as many tokens of any kind."""
    score = recipe.score
    if not isinstance(score, Reconstruction) or score.instructions is not None:
        return recipe
    return replace(recipe, score=replace(score, instructions=(tuple(range(8)), tuple(range(13)))))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: the language part without embeddings, of which it reads few rows."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    read = {id(weights): weights for part in (model.get_decoder(), head) for weights in _weights(part)}
    if embeddings.weight is not head.weight:
        read.pop(id(embeddings.weight))
    return sum(weights.nbytes for weights in read.values())


def _weights(part: nn.Module) -> list[nn.Parameter]:
    return list(part.parameters())
