"""The architecture, and the initial weights of its attention heads."""

import math
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsight.reader.page import LETTERS, PATCH
from training.attention import NAME as PLAIN
from training.targets import GRID, SLOTS, basis, token_meaning

WIDTH = 256
HEADS = 8
HEAD_DIM = WIDTH // HEADS
KV_HEADS = 4
LOOKS = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, -1), (0, 1))
"""Offsets, in patches to the right and down, that heads of the first vision layers attend to initially."""
ROPE_THETA = 1e6
DECODER_LAYERS = 6
VISION_LAYERS = 4
VISION_MLP = 1536


def config(vocabulary: int, image_token: int, pad: int, bos: int, eos: int) -> LlavaConfig:
    """A LLaVA with 576 vision tokens per image."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=VISION_MLP,
        hidden_act="gelu",
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=336,
        patch_size=14,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=640,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.04,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )


def build(model_config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """An untrained model whose first attention layers are initialised to attend to neighbours."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(model_config)
    model.set_attn_implementation(PLAIN)
    with torch.no_grad():
        frames = point_decoder_heads(model.model.language_model)
        point_reading_heads(model.model.language_model, frames)
        point_vision_heads(model.model.vision_tower)
        model.model.multi_modal_projector.linear_2.weight.mul_(0.1)
    return model


def point_decoder_heads(decoder: Any, strength: float = 6.0, match: float = 2.0) -> tuple[torch.Tensor, ...]:
    """Initialise previous-token heads in the decoder's first layers and content-matching heads in later ones.

    After RoPE the product of a constant query and a constant key depends only on their distance, so biases are enough
    to make a head attend 1, 2 or 3 tokens back. Each head writes to its own subspace, which later heads compare with
    their query. Look-up needs both kinds of heads, and takes long to learn from random weights.

    Returns the eight frames, of 32 directions each, that these heads write to and compare.
    """
    half = HEAD_DIM // 2
    rates = ROPE_THETA ** (-torch.arange(half) / half)
    frames = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q.split(HEAD_DIM)
    slow = slow_dimensions()
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.mul_((2 * DECODER_LAYERS) ** -0.5)
        layer.mlp.down_proj.weight.mul_((2 * DECODER_LAYERS) ** -0.5)
    for layer in decoder.layers[:2]:
        attention = layer.self_attn
        for head, back in enumerate((1, 2, 3, 0)):
            rows, kv = rows_of(head), rows_of(head // (HEADS // KV_HEADS))
            attention.q_proj.weight[rows] = 0
            attention.k_proj.weight[kv] = 0
            attention.q_proj.bias[rows] = strength * torch.cat([torch.cos(rates * back), -torch.sin(rates * back)])
            attention.k_proj.bias[kv] = strength * torch.cat([torch.ones(half), torch.zeros(half)])
            attention.v_proj.weight[kv] = frames[0]
            attention.o_proj.weight[:, rows] = 0.15 * frames[1 + head].T
    for layer in decoder.layers[2:5]:
        attention = layer.self_attn
        for head, frame in enumerate((0, 0, 1, 2)):
            for query in (2 * head, 2 * head + 1):
                attention.q_proj.weight[query * HEAD_DIM + slow] = match * frames[0][slow]
                attention.o_proj.weight[:, rows_of(query)] = 0.15 * frames[4 + head].T
            attention.k_proj.weight[head * HEAD_DIM + slow] = match * frames[frame][slow]
            attention.v_proj.weight[rows_of(head)] = frames[4 + head]
    return frames


def point_reading_heads(
    decoder: Any, frames: tuple[torch.Tensor, ...], strength: float = 6.0, match: float = 1.5, loudness: float = 0.3
) -> None:
    """Initialise heads for transcription: in layer 0 one row of patches up and 6 and 5 tokens back, joined in layer 1.

    Transcribing a list means going from a record to the one below it. Attention is causal, so only the lower patch can
    know the upper one. The token before a new record, 6 and 5 tokens after the last key, finds the lower patch by what
    is printed above it.
    """
    half = HEAD_DIM // 2
    rates = ROPE_THETA ** (-torch.arange(half) / half)
    slow = slow_dimensions()
    first, second = decoder.layers[0].self_attn, decoder.layers[1].self_attn
    letters = torch.stack([token_meaning(basis(WIDTH), letter) for letter in LETTERS])
    above = SLOTS**0.5 * frames[0] @ letters.T @ letters
    for head, back, value, frame in (
        (4, GRID, above, frames[5]),
        (6, 6, frames[0], frames[7]),
        (7, 5, frames[0], frames[4]),
    ):
        rows, kv = rows_of(head), rows_of(head // (HEADS // KV_HEADS))
        first.q_proj.weight[rows] = 0
        first.k_proj.weight[kv] = 0
        first.q_proj.bias[rows] = strength * torch.cat([torch.cos(rates * back), -torch.sin(rates * back)])
        first.k_proj.bias[kv] = strength * torch.cat([torch.ones(half), torch.zeros(half)])
        first.v_proj.weight[kv] = value
        first.o_proj.weight[:, rows] = loudness * frame.T
    kv = rows_of(2)
    second.k_proj.weight[kv] = 0
    second.k_proj.weight[kv][slow] = match * frames[5][slow]
    second.v_proj.weight[kv] = frames[0]
    for head, frame in ((4, frames[7]), (5, frames[4])):
        second.q_proj.weight[rows_of(head)] = 0
        second.q_proj.weight[rows_of(head)][slow] = match * frame[slow]
        second.o_proj.weight[:, rows_of(head)] = loudness * frames[0].T


def slow_dimensions() -> torch.Tensor:
    """Head dimensions that RoPE rotates slowly enough to compare content across a page."""
    half = HEAD_DIM // 2
    return torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, HEAD_DIM)])


def rows_of(head: int) -> slice:
    """Rows of a projection matrix that belong to a head."""
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)


def point_vision_heads(tower: Any, layers: int = 3, strength: float = 2.2) -> None:
    """Initialise position embeddings with Fourier features, and early heads to attend one patch aside.

    Characters cross patch borders, so reading a patch needs its neighbours.
    """
    tower = getattr(tower, "vision_model", tower)
    half = HEAD_DIM // 2
    rates = math.tau / 32 * torch.arange(1, half // 2 + 1)
    steps = torch.arange(GRID)
    wave = torch.cat([torch.cos(steps[:, None] * rates), torch.sin(steps[:, None] * rates)], dim=1) * math.sqrt(2)
    table = tower.embeddings.position_embedding.weight
    table.zero_()
    table[1:, :half] = wave.repeat(GRID, 1)
    table[1:, half:HEAD_DIM] = wave.repeat_interleave(GRID, 0)
    tower.embeddings.patch_embedding.weight.copy_(first_look())
    tower.embeddings.class_embedding.zero_()
    # Scaled down so that the layers' outputs outweigh the pixels.
    tower.pre_layrnorm.weight.fill_(0.25)
    eye = torch.eye(HEAD_DIM)
    for layer in tower.encoder.layers[:layers]:
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for head, (dx, dy) in enumerate(LOOKS):
            rows = rows_of(head)
            turn = torch.block_diag(rotation(rates * dx), rotation(rates * dy))
            query[rows] = 0
            key[rows] = 0
            query[rows, :HEAD_DIM] = strength * turn
            key[rows, :HEAD_DIM] = strength * eye


def first_look(grey: float = 1.5, tone: float = 0.03) -> torch.Tensor:
    """Initial patch embedding, `[WIDTH, 3, 14, 14]`: zeros for the positions, one dimension for the grey level of each
    pixel, and random mixtures of the colours of the patch's quarters. It keeps all of a patch's contents.
    """
    weight = torch.zeros(WIDTH, 3, PATCH, PATCH)
    pixels = PATCH * PATCH
    # Alternating signs keep the layer norm's mean near zero for bright and dark patches, and positions unchanged.
    signs = (torch.arange(pixels) % 2 * 2 - 1).float()
    weight[HEAD_DIM : HEAD_DIM + pixels] = grey / 3 * torch.diag(signs).view(pixels, 1, PATCH, PATCH)
    quarters = torch.randn(WIDTH - HEAD_DIM - pixels, 3, 2, 2)
    quarters -= quarters.mean(1, keepdim=True)
    half = PATCH // 2
    weight[HEAD_DIM + pixels :] = tone * quarters.repeat_interleave(half, 2).repeat_interleave(half, 3)
    return weight


def rotation(angles: torch.Tensor) -> torch.Tensor:
    """Rotation matrix `[2n, 2n]` that adds `angles` to features stored as (cosines, sines)."""
    cos, sin = torch.diag(torch.cos(angles)), torch.diag(torch.sin(angles))
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def see(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Projected patch features of images of any height: `[B, 3, H, 336]` -> `[B, H // 14 * 24, WIDTH]`."""
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    first = tower.embeddings.class_embedding.expand(patches.shape[0], 1, -1)
    hidden = torch.cat([first, patches], dim=1)
    hidden = tower.pre_layrnorm(hidden + tower.embeddings.position_embedding.weight[: hidden.shape[1]])
    hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
    return model.model.multi_modal_projector(hidden[:, 1:])
