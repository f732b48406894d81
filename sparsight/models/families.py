"""The table of model families: which tokens are vision tokens, and which pixels each one stands for."""

from dataclasses import dataclass
from typing import Any

from sparsight.models.layouts import (
    Layout,
    base_and_tiles,
    merged_patches,
    packed_slices,
    single_grid,
    square_grid,
    square_tiles,
)
from sparsight.models.tile_places import CLOSEST_RATIO, COVERING, LONGEST_EDGE, SLICES, Cut


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Args:
        model_type: ``config.model_type`` in transformers.
        model_class: the name of the class in transformers.
        layout: the order in which pixels become vision tokens.
        token_fields: the config fields that hold the ids of vision tokens, for images and video frames.
        video: whether the family takes videos.
        uncompressed_layers: the kind of layers that hold a bounded state already and are not compressed. Which layers
            those are is read from the model's config.
        chunked_prefill: whether prefill in chunks gives the same result as unchunked prefill. It does not where image
            tokens attend to each other in both directions, nor where one forward pass needs all of the images.
        first_position: position id of a prompt's first token.
        cut: how its image processor cuts images into tiles, where its outputs do not say it.
    """

    model_type: str
    model_class: str
    layout: Layout
    token_fields: tuple[str, ...] = ("image_token_id",)
    video: bool = False
    uncompressed_layers: str = ""
    chunked_prefill: bool = True
    first_position: int = 0
    cut: Cut | None = None

    def token_ids(self, config: Any) -> list[int]:
        """Ids of the vision tokens in a model's config."""
        ids = [getattr(config, field) for field in self.token_fields]
        return [token for token in ids if token is not None]


BOTH = ("image_token_id", "video_token_id")

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "LlavaForConditionalGeneration", single_grid),
        Family("vipllava", "VipLlavaForConditionalGeneration", square_grid),
        Family("llava_next", "LlavaNextForConditionalGeneration", base_and_tiles),
        Family("llava_next_video", "LlavaNextVideoForConditionalGeneration", base_and_tiles, BOTH, video=True),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", base_and_tiles, BOTH, video=True),
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("qwen3_vl", "Qwen3VLForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", merged_patches, BOTH, video=True),
        # Video frames use the image token too.
        Family("glm4v", "Glm4vForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("internvl", "InternVLForConditionalGeneration", square_tiles, video=True, cut=CLOSEST_RATIO),
        Family("idefics3", "Idefics3ForConditionalGeneration", square_tiles, cut=LONGEST_EDGE),
        Family("smolvlm", "SmolVLMForConditionalGeneration", square_tiles, video=True, cut=LONGEST_EDGE),
        Family("ovis2", "Ovis2ForConditionalGeneration", square_tiles, chunked_prefill=False, cut=COVERING),
        Family(
            "aya_vision",
            "AyaVisionForConditionalGeneration",
            square_tiles,
            uncompressed_layers="sliding window",
            cut=CLOSEST_RATIO,
        ),
        Family(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            square_grid,
            uncompressed_layers="sliding window",
            chunked_prefill=False,
        ),
        Family("paligemma", "PaliGemmaForConditionalGeneration", square_grid, chunked_prefill=False, first_position=1),
        Family("mistral3", "Mistral3ForConditionalGeneration", single_grid),
        Family(
            "minicpmv4_6",
            "MiniCPMV4_6ForConditionalGeneration",
            packed_slices,
            BOTH,
            video=True,
            uncompressed_layers="linear attention",
            cut=SLICES,
        ),
    )
}

CROSS_ATTENTION = ("idefics", "mllama", "mllama_text_model")
"""Families that attend to images through cross-attention layers: their prompts have no vision tokens."""


def text_only(config: Any) -> bool:
    """Whether a model, given its config, is a language model without images."""
    return config.get_text_config() is config and config.model_type not in FAMILIES


def family_of(config: Any) -> Family | None:
    """The family of a model, given its config; None for a text-only model.

    Raises:
        ValueError: the family is not in the table, or cannot be compressed.
    """
    name = config.model_type
    if name in CROSS_ATTENTION:
        raise ValueError(
            f"Model type {name!r} is not supported: it attends to images through cross-attention layers, so the prompt "
            "has no vision tokens to keep or drop."
        )
    if name not in FAMILIES and not text_only(config):
        raise ValueError(
            f"Model type {name!r} is not in the table of families: known are {', '.join(FAMILIES)}. "
            "CONTRIBUTING.md shows how to add one in five lines."
        )
    return FAMILIES.get(name)


def check_chunks(config: Any) -> None:
    """Raise ValueError unless a model, given its config, supports prefill in chunks."""
    family = family_of(config)
    if family is not None and not family.chunked_prefill:
        raise ValueError(f"{config.model_type!r} models cannot prefill in chunks: leave the chunk size out.")
