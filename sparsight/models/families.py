"""What differs between model families, as a table: the tokens that stand for vision, and the places they stand for."""

from dataclasses import dataclass
from typing import Any

from sparsight.models.layouts import (
    Layout,
    base_and_tiles,
    merged_patches,
    packed_slices,
    square_tiles,
    squares,
    whole_grid,
)


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Args:
        model_type: ``config.model_type`` in transformers.
        model_class: the class in transformers.
        layout: the order in which the pixels of pictures become vision tokens.
        token_fields: config fields that hold the ids of the tokens that stand for pieces of images and video frames.
        video: whether the family takes videos.
        left_alone: layers that hold a bounded state already and stay as they are; transformers tells which they are.
        in_chunks: whether a prompt with pictures in chunks is prefilled as it is whole: not where pictures are seen in
            both directions, nor where a forward pass wants all of them.
    """

    model_type: str
    model_class: str
    layout: Layout
    token_fields: tuple[str, ...] = ("image_token_id",)
    video: bool = False
    left_alone: str = ""
    in_chunks: bool = True

    def token_ids(self, config: Any) -> list[int]:
        """Ids of the tokens that stand for vision, by a model's config."""
        ids = [getattr(config, field) for field in self.token_fields]
        return [token for token in ids if token is not None]


BOTH = ("image_token_id", "video_token_id")

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "LlavaForConditionalGeneration", whole_grid),
        Family("vipllava", "VipLlavaForConditionalGeneration", squares),
        Family("llava_next", "LlavaNextForConditionalGeneration", base_and_tiles),
        Family("llava_next_video", "LlavaNextVideoForConditionalGeneration", base_and_tiles, BOTH, video=True),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", base_and_tiles, BOTH, video=True),
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("qwen3_vl", "Qwen3VLForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", merged_patches, BOTH, video=True),
        # Its video frames are marked by the image token.
        Family("glm4v", "Glm4vForConditionalGeneration", merged_patches, BOTH, video=True),
        Family("internvl", "InternVLForConditionalGeneration", square_tiles, video=True),
        Family("idefics3", "Idefics3ForConditionalGeneration", square_tiles),
        Family("smolvlm", "SmolVLMForConditionalGeneration", square_tiles, video=True),
        Family("ovis2", "Ovis2ForConditionalGeneration", square_tiles, in_chunks=False),
        Family("aya_vision", "AyaVisionForConditionalGeneration", square_tiles, left_alone="sliding window"),
        Family("gemma3", "Gemma3ForConditionalGeneration", squares, left_alone="sliding window", in_chunks=False),
        Family("paligemma", "PaliGemmaForConditionalGeneration", squares, in_chunks=False),
        Family("mistral3", "Mistral3ForConditionalGeneration", whole_grid),
        Family(
            "minicpmv4_6",
            "MiniCPMV4_6ForConditionalGeneration",
            packed_slices,
            BOTH,
            video=True,
            left_alone="linear attention",
        ),
    )
}

CROSS_ATTENTION = ("idefics", "mllama", "mllama_text_model")
"""Families whose text looks at pictures through layers of their own: pictures are no tokens of the prompt."""


def family_of(config: Any) -> Family | None:
    """The family of a model by its config, None for a model of text alone.

    Raises:
        ValueError: the family is not in the table, or cannot be compressed.
    """
    name = config.model_type
    if name in CROSS_ATTENTION:
        raise ValueError(
            f"Model type {name!r} is not supported: its text attends to pictures through cross-attention layers, whose "
            "keys and values belong to the pictures, so the prompt has no vision tokens to keep or drop."
        )
    if name not in FAMILIES and config.get_text_config() is not config:
        raise ValueError(
            f"Model type {name!r} is not in the table of families, so its vision tokens are not known: known are "
            f"{', '.join(FAMILIES)}. Adding one takes five lines, which CONTRIBUTING.md shows."
        )
    return FAMILIES.get(name)


def check_chunks(config: Any) -> None:
    """Raise ValueError unless prompts of a model, by its config, can be given in chunks."""
    family = family_of(config)
    if family is not None and not family.in_chunks:
        raise ValueError(f"Prompts of {config.model_type!r} models cannot be prefilled in chunks: give them whole.")
