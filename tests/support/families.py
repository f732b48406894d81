"""A tiny random model of each family, and its processor's outputs for images and videos.

Pictures are random pixels; one of them is ``SIDE x 2 * SIDE`` pixels where the family takes any size, and one or three
tiles of ``SIDE x SIDE`` where it cuts pictures into tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tr
from torch import Generator, Tensor

VOCABULARY = 120
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, ROW_END, IMAGE_END, TIMESTAMP = range(110, 117)
INDICATORS = [100, 101, 102, 103, 104]
PAD = 0
HEADS = {"1:1": (4, 4), "1:2": (4, 2), "1:8": (8, 1)}
LAYERS = 3
PATCH, SIDE = 7, 28

Pixels = dict[str, Tensor]


@dataclass(frozen=True)
class Medium:
    """An image or a video as the processor returns it.

    Args:
        pixels: what goes to the vision tower.
        ids: the tokens that stand for it, with those that the processor puts around and between them.
        types: ``mm_token_type_ids`` of those tokens.
    """

    pixels: Pixels
    ids: list[int]
    types: list[int]


Make = Callable[[Generator, torch.dtype], Medium]


def _concatenate(rows: list[list[Pixels]]) -> Pixels:
    """Pixels of a batch from those of each sequence's images: all images concatenated."""
    every = [pixels for row in rows for pixels in row]
    return {name: torch.cat([pixels[name] for pixels in every]) for name in every[0]}


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model and its inputs.

    Args:
        build: the model, for a grouping of its heads.
        image: one picture.
        video: one video, where the family takes it.
        collate: pixels of a batch from those of each sequence.
        token_types: type masks that the processor returns, by name, from token ids and ``mm_token_type_ids``.
    """

    build: Callable[[str], tr.PreTrainedModel]
    image: Make
    video: Make | None = None
    collate: Callable[[list[list[Pixels]]], Pixels] = _concatenate
    token_types: dict[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)


def text_config(heads: str, layers: int = LAYERS) -> dict[str, Any]:
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


def head_dim(heads: str) -> int:
    return 64 // HEADS[heads][0]


def vision_config() -> dict[str, Any]:
    """The config of a CLIP tower."""
    return tr.CLIPVisionConfig(**_tower(), image_size=SIDE, patch_size=PATCH, initializer_range=0.3).to_dict()


def _tower() -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def siglip(side: int = SIDE) -> dict[str, Any]:
    config = tr.SiglipVisionConfig(**_tower(), image_size=side, patch_size=PATCH, vision_use_head=False)
    return config.to_dict() | {"initializer_range": 0.3}


def _pixels(generator: Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _vision(count: int, token: int = IMAGE_TOKEN, kind: int = 1) -> tuple[list[int], list[int]]:
    return [token] * count, [kind] * count


def _tiles(number: int, tokens: int, name: str = "pixel_values", side: int = SIDE) -> Make:
    """An image in tiles of ``tokens`` tokens each."""

    def make(generator: Generator, dtype: torch.dtype) -> Medium:
        ids, types = _vision(number * tokens)
        return Medium({name: _pixels(generator, dtype, number, 3, side, side)}, ids, types)

    return make


# Llava and those that share its tower


def _llama(heads: str) -> dict[str, Any]:
    return tr.LlamaConfig(**text_config(heads)).to_dict()


def _llava(heads: str) -> tr.PreTrainedModel:
    config = tr.LlavaConfig(vision_config=vision_config(), text_config=_llama(heads), image_token_index=IMAGE_TOKEN)
    return tr.LlavaForConditionalGeneration(config)


def _vipllava(heads: str) -> tr.PreTrainedModel:
    config = tr.VipLlavaConfig(
        vision_config=vision_config(),
        text_config=_llama(heads),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-1, -2],
    )
    return tr.VipLlavaForConditionalGeneration(config)


PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]


def _llava_next(heads: str) -> tr.PreTrainedModel:
    config = tr.LlavaNextConfig(
        vision_config=vision_config(),
        text_config=_llama(heads),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )
    return tr.LlavaNextForConditionalGeneration(config)


def _llava_next_video(heads: str) -> tr.PreTrainedModel:
    config = tr.LlavaNextVideoConfig(
        vision_config=vision_config(),
        text_config=_llama(heads),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )
    return tr.LlavaNextVideoForConditionalGeneration(config)


def _llava_onevision(heads: str) -> tr.PreTrainedModel:
    config = tr.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=tr.Qwen2Config(**text_config(heads)).to_dict(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )
    return tr.LlavaOnevisionForConditionalGeneration(config)


def _anyres(generator: Generator, dtype: torch.dtype) -> Medium:
    """28 x 56 pixels: a base tile of 4 x 4 patches, and two adjacent tiles with 4 rows that end in a newline token."""
    ids, types = _vision(16 + 4 * 9)
    pixels = {
        "pixel_values": _pixels(generator, dtype, 1, 3, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([[SIDE, 2 * SIDE]]),
    }
    return Medium(pixels, ids, types)


def _pooled_frames(extra: int) -> Make:
    """Three frames of 2 x 2 tokens, and ``extra`` tokens at the end of the video."""

    def make(generator: Generator, dtype: torch.dtype) -> Medium:
        ids, types = _vision(3 * 4 + extra, VIDEO_TOKEN, 2)
        return Medium({"pixel_values_videos": _pixels(generator, dtype, 1, 3, 3, SIDE, SIDE)}, ids, types)

    return make


# Families with tiles of one size, of which some merge four patches into a token


def _internvl(heads: str) -> tr.PreTrainedModel:
    config = tr.InternVLConfig(
        vision_config={**_tower(), "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "initializer_range": 0.3},
        text_config=tr.Qwen2Config(**text_config(heads)).to_dict(),
        image_token_id=IMAGE_TOKEN,
    )
    return tr.InternVLForConditionalGeneration(config)


def _internvl_video(generator: Generator, dtype: torch.dtype) -> Medium:
    """Three frames, each encoded as an image after the text with its number."""
    ids, types = [], []
    for _ in range(3):
        ids += [TIMESTAMP, VISION_START, *[IMAGE_TOKEN] * 4, VISION_END]
        types += [0, 0, 1, 1, 1, 1, 0]
    return Medium({"pixel_values": _pixels(generator, dtype, 3, 3, SIDE, SIDE)}, ids, types)


def _aya_vision(heads: str) -> tr.PreTrainedModel:
    text = text_config(heads) | {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 8,
    }
    config = tr.AyaVisionConfig(
        vision_config=siglip(),
        text_config=tr.Cohere2Config(**text).to_dict(),
        image_token_index=IMAGE_TOKEN,
    )
    return tr.AyaVisionForConditionalGeneration(config)


def _ovis2(heads: str) -> tr.PreTrainedModel:
    config = tr.Ovis2Config(
        vision_config={
            **_tower(),
            "image_size": SIDE,
            "patch_size": PATCH,
            "vocab_size": 40,
            "hidden_stride": 2,
            "initializer_range": 0.3,
        },
        text_config=tr.Qwen2Config(**text_config(heads)).to_dict(),
        image_token_id=IMAGE_TOKEN,
        visual_indicator_token_ids=INDICATORS,
        vocab_size=VOCABULARY,
        hidden_size=64,
    )
    return tr.Ovis2ForConditionalGeneration(config)


def _ovis2_image(generator: Generator, dtype: torch.dtype) -> Medium:
    """A thumbnail and two adjacent tiles, between tokens that name their places."""
    start, grid, column, _, end = INDICATORS
    atoms = [IMAGE_TOKEN] * 4
    ids = [start, *atoms, grid, *atoms, column, *atoms, end]
    types = [int(token == IMAGE_TOKEN) for token in ids]
    return Medium({"pixel_values": _pixels(generator, dtype, 3, 3, SIDE, SIDE)}, ids, types)


def _idefics3(heads: str) -> tr.PreTrainedModel:
    return tr.Idefics3ForConditionalGeneration(_idefics_config(tr.Idefics3Config, heads))


def _smolvlm(heads: str) -> tr.PreTrainedModel:
    return tr.SmolVLMForConditionalGeneration(_idefics_config(tr.SmolVLMConfig, heads))


def _idefics_config(kind: type, heads: str) -> Any:
    return kind(
        vision_config={**_tower(), "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3},
        text_config=_llama(heads),
        image_token_id=IMAGE_TOKEN,
    )


def _idefics_image(generator: Generator, dtype: torch.dtype) -> Medium:
    """Two adjacent tiles and the full image, each after tokens that name its place."""
    ids = [VISION_START, 91, *[IMAGE_TOKEN] * 4, VISION_START, 92, *[IMAGE_TOKEN] * 4, ROW_END]
    ids += [VISION_START, 93, *[IMAGE_TOKEN] * 4, VISION_START]
    pixels = {
        "pixel_values": _pixels(generator, dtype, 1, 3, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(1, 3, SIDE, SIDE, dtype=torch.long),
    }
    return Medium(pixels, ids, [int(token == IMAGE_TOKEN) for token in ids])


def _idefics_video(generator: Generator, dtype: torch.dtype) -> Medium:
    """Two frames, each after its timestamp."""
    frame = [TIMESTAMP, VISION_START, *[IMAGE_TOKEN] * 4, VISION_START]
    pixels = {
        "pixel_values": _pixels(generator, dtype, 1, 2, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(1, 2, SIDE, SIDE, dtype=torch.long),
    }
    return Medium(pixels, 2 * frame, [int(token == IMAGE_TOKEN) for token in 2 * frame])


def _pad_tiles(rows: list[list[Pixels]]) -> Pixels:
    """The tiles of each sequence, padded with empty tiles."""
    every = [pixels for row in rows for pixels in row]
    most = max(sum(pixels["pixel_values"].shape[1] for pixels in row) for row in rows)
    padded = {}
    for name, like in every[0].items():
        stacked = [torch.cat([like[:, :0], *(pixels[name] for pixels in row)], dim=1) for row in rows]
        padded[name] = torch.cat(
            [torch.cat([row, row.new_zeros(1, most - row.shape[1], *row.shape[2:])], dim=1) for row in stacked]
        )
    return padded


# Gemma's: vision tokens, or the whole prompt, see each other in both directions


def _gemma3(heads: str, first_layer: str = "sliding_attention") -> tr.PreTrainedModel:
    text = text_config(heads) | {
        "head_dim": head_dim(heads),
        "query_pre_attn_scalar": head_dim(heads),
        "layer_types": [first_layer, "full_attention", "full_attention"],
        "sliding_window": 8,
    }
    config = tr.Gemma3Config(
        vision_config=siglip(),
        text_config=tr.Gemma3TextConfig(**text).to_dict(),
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        initializer_range=0.25,
    )
    model = tr.Gemma3ForConditionalGeneration(config)
    # It is born as zeros.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model


def _paligemma(heads: str) -> tr.PreTrainedModel:
    config = tr.PaliGemmaConfig(
        vision_config=siglip() | {"projection_dim": 64},
        text_config=tr.GemmaConfig(**text_config(heads), head_dim=head_dim(heads)).to_dict(),
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
        tie_word_embeddings=False,
    )
    return tr.PaliGemmaForConditionalGeneration(config)


# Pictures of any size


def _mistral3(heads: str) -> tr.PreTrainedModel:
    config = tr.Mistral3Config(
        vision_config=tr.PixtralVisionConfig(
            **_tower(), image_size=4 * SIDE, patch_size=PATCH, head_dim=16, initializer_range=0.3
        ).to_dict(),
        text_config=tr.MistralConfig(**text_config(heads), head_dim=head_dim(heads), sliding_window=None).to_dict(),
        image_token_index=IMAGE_TOKEN,
    )
    return tr.Mistral3ForConditionalGeneration(config)


def _pixtral_image(generator: Generator, dtype: torch.dtype) -> Medium:
    """2 x 4 merged patches, with a token at the end of each row and one at the end of the image."""
    row = [IMAGE_TOKEN] * 4
    ids = [*row, ROW_END, *row, IMAGE_END]
    pixels = {
        "pixel_values": _pixels(generator, dtype, 1, 3, SIDE, 2 * SIDE),
        "image_sizes": torch.tensor([[SIDE, 2 * SIDE]]),
    }
    return Medium(pixels, ids, [int(token == IMAGE_TOKEN) for token in ids])


def _qwen_vision(**others: Any) -> dict[str, Any]:
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    return {**tower, "patch_size": PATCH, "initializer_range": 0.3, **others}


QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _mrope(heads: str, **others: Any) -> dict[str, Any]:
    section = [2, 3, 3] if heads != "1:8" else [1, 1, 2]
    return {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0, **others}


def _qwen2_vl(heads: str) -> tr.PreTrainedModel:
    config = tr.Qwen2VLConfig(
        text_config={**text_config(heads), "rope_parameters": _mrope(heads)},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH,
            "initializer_range": 0.3,
        },
        **QWEN_TOKENS,
    )  # fmt: skip
    return tr.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(heads: str) -> tr.PreTrainedModel:
    config = tr.Qwen2_5_VLConfig(
        text_config={**text_config(heads), "rope_parameters": _mrope(heads)},
        vision_config=_qwen_vision(window_size=28, fullatt_block_indexes=[1]),
        **QWEN_TOKENS,
    )
    return tr.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl_parts(heads: str) -> dict[str, Any]:
    rope = _mrope(heads, mrope_interleaved=True)
    return {
        "text_config": {**text_config(heads), "head_dim": head_dim(heads), "rope_parameters": rope},
        # Features of both blocks go into the language part's first two layers.
        "vision_config": _qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **QWEN_TOKENS,
    }


def _qwen3_vl(heads: str) -> tr.PreTrainedModel:
    return tr.Qwen3VLForConditionalGeneration(tr.Qwen3VLConfig(**_qwen3_vl_parts(heads)))


def _qwen3_vl_moe(heads: str) -> tr.PreTrainedModel:
    parts = _qwen3_vl_parts(heads)
    parts["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return tr.Qwen3VLMoeForConditionalGeneration(tr.Qwen3VLMoeConfig(**parts))


def _glm4v(heads: str) -> tr.PreTrainedModel:
    section = [1, 1, 2] if heads != "1:8" else [1, 1, 0]
    rope = {
        "rope_type": "default", "mrope_section": section, "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    config = tr.Glm4vConfig(
        text_config={**text_config(heads), "rope_parameters": rope},
        vision_config=_qwen_vision(image_size=SIDE),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VISION_START,
        video_end_token_id=VISION_END,
    )
    return tr.Glm4vForConditionalGeneration(config)


def _patches(generator: Generator, dtype: torch.dtype, frames: int) -> Tensor:
    return _pixels(generator, dtype, frames * 4 * 8, 3 * 2 * PATCH * PATCH)


def _qwen_image(generator: Generator, dtype: torch.dtype) -> Medium:
    """2 x 4 squares of merged patches."""
    ids, types = _vision(8)
    pixels = {"pixel_values": _patches(generator, dtype, 1), "image_grid_thw": torch.tensor([[1, 4, 8]])}
    return Medium(pixels, ids, types)


def _qwen_video(generator: Generator, dtype: torch.dtype) -> Medium:
    """Three pairs of frames."""
    ids, types = _vision(3 * 8, VIDEO_TOKEN, 2)
    return Medium(_video_patches(generator, dtype), ids, types)


def _timed_video(token: int) -> Make:
    """Three pairs of frames, each after its timestamp."""

    def make(generator: Generator, dtype: torch.dtype) -> Medium:
        frame = [TIMESTAMP, VISION_START, *[token] * 8, VISION_END]
        types = [0, 0, *[2] * 8, 0]
        return Medium(_video_patches(generator, dtype), 3 * frame, 3 * types)

    return make


def _video_patches(generator: Generator, dtype: torch.dtype) -> Pixels:
    return {"pixel_values_videos": _patches(generator, dtype, 3), "video_grid_thw": torch.tensor([[3, 4, 8]])}


def _minicpm(heads: str) -> tr.PreTrainedModel:
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    text = text_config(heads) | linear | {
        "head_dim": head_dim(heads),
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "rope_parameters": _mrope(heads, mrope_interleaved=True),
    }  # fmt: skip
    config = tr.MiniCPMV4_6Config(
        text_config=tr.Qwen3_5TextConfig(**text).to_dict(),
        vision_config={**_tower(), "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3},
        insert_layer_id=0,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
    )
    return tr.MiniCPMV4_6ForConditionalGeneration(config)


def _minicpm_image(generator: Generator, dtype: torch.dtype) -> Medium:
    """The full image of 2 x 2 tokens, and a slice of 1 x 2 tokens."""
    ids = [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, VISION_START, *[IMAGE_TOKEN] * 2, VISION_END]
    pixels = {
        "pixel_values": _pixels(generator, dtype, 1, 3, PATCH, (64 + 32) * PATCH),
        "target_sizes": torch.tensor([[8, 8], [4, 8]], dtype=torch.int32),
    }
    return Medium(pixels, ids, [int(token == IMAGE_TOKEN) for token in ids])


def _minicpm_video(generator: Generator, dtype: torch.dtype) -> Medium:
    """Two frames of 2 x 2 tokens."""
    ids = 2 * [VISION_START, *[VIDEO_TOKEN] * 4, VISION_END]
    pixels = {
        "pixel_values_videos": _pixels(generator, dtype, 1, 3, PATCH, 2 * 64 * PATCH),
        "target_sizes_videos": torch.tensor([[8, 8], [8, 8]], dtype=torch.int32),
    }
    return Medium(pixels, ids, [2 * int(token == VIDEO_TOKEN) for token in ids])


def _pack_patches(rows: list[list[Pixels]]) -> Pixels:
    """The patches of all images side by side."""
    every = [pixels for row in rows for pixels in row]
    return {
        name: torch.cat([pixels[name] for pixels in every], dim=-1 if name.startswith("pixel") else 0)
        for name in every[0]
    }


def gemma3_without_windows(heads: str) -> tr.PreTrainedModel:
    """Gemma3 with full attention, hence compressed entries, in all layers."""
    return _gemma3(heads, "full_attention")


MM_TYPES = {"mm_token_type_ids": lambda ids, types: types}

TINY = {
    "llava": Tiny(_llava, _tiles(1, 16)),
    "vipllava": Tiny(_vipllava, _tiles(1, 16)),
    "llava_next": Tiny(_llava_next, _anyres),
    "llava_next_video": Tiny(_llava_next_video, _anyres, _pooled_frames(0)),
    "llava_onevision": Tiny(_llava_onevision, _anyres, _pooled_frames(1)),
    "qwen2_vl": Tiny(_qwen2_vl, _qwen_image, _qwen_video, token_types=MM_TYPES),
    "qwen2_5_vl": Tiny(_qwen2_5_vl, _qwen_image, _qwen_video, token_types=MM_TYPES),
    "qwen3_vl": Tiny(_qwen3_vl, _qwen_image, _timed_video(VIDEO_TOKEN), token_types=MM_TYPES),
    "qwen3_vl_moe": Tiny(_qwen3_vl_moe, _qwen_image, _timed_video(VIDEO_TOKEN), token_types=MM_TYPES),
    "glm4v": Tiny(_glm4v, _qwen_image, _timed_video(IMAGE_TOKEN), token_types=MM_TYPES),
    "internvl": Tiny(_internvl, _tiles(3, 4), _internvl_video),
    "aya_vision": Tiny(_aya_vision, _tiles(3, 4)),
    "ovis2": Tiny(_ovis2, _ovis2_image),
    "idefics3": Tiny(_idefics3, _idefics_image, collate=_pad_tiles),
    "smolvlm": Tiny(_smolvlm, _idefics_image, _idefics_video, collate=_pad_tiles),
    "gemma3": Tiny(_gemma3, _tiles(1, 4), token_types={"token_type_ids": lambda ids, types: types}),
    "paligemma": Tiny(_paligemma, _tiles(1, 16), token_types={"token_type_ids": lambda ids, types: types * 0}),
    "mistral3": Tiny(_mistral3, _pixtral_image),
    "minicpmv4_6": Tiny(_minicpm, _minicpm_image, _minicpm_video, collate=_pack_patches),
}
