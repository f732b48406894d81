"""Patches as vectors of the language model: a learned vector for each feature of a patch."""

import math

import torch
from transformers import PreTrainedTokenizerBase

from sparsight.reader.page import GLYPHS
from sparsight.reader.scene import COLORS, SHAPES
from training.targets import FEATURES, FIRST_COLOR, FIRST_SHAPE, SLOTS, glyph_feature

SEED = 20261122
SHARE = 0.6
"""Cosine between a character's initial vector and the embedding of its token."""


def rotation(width: int, generator: torch.Generator) -> torch.Tensor:
    """A random rotation `[width, width]`."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator)).Q


def initial_vectors(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Initial vectors of the features, `[FEATURES, width]`, float32.

    A character's is the embedding of its token, mixed with a rotation of it that differs between the slots of a patch,
    so that their order can be read. Shapes and colours start as the embeddings of their names, positions as noise.
    """
    generator = torch.Generator().manual_seed(SEED)
    table = torch.randn(FEATURES, embeddings.shape[1], generator=generator) * 0.02

    def embedding(text: str) -> torch.Tensor:
        (token,) = tokenizer(text)["input_ids"]
        return embeddings[token].float()

    for slot in range(SLOTS):
        turn = rotation(embeddings.shape[1], generator)
        for char in GLYPHS:
            exact = embedding(char)
            table[glyph_feature(char, slot)] = SHARE * exact + math.sqrt(1 - SHARE**2) * turn @ exact
    for first, names in ((FIRST_SHAPE, SHAPES), (FIRST_COLOR, COLORS)):
        for index, name in enumerate(names):
            table[first + index] = embedding(f" {name}")
    return table
