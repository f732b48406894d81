"""What training computes with, against torch's own."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsight.zoo.page import DIGITS
from sparsight.zoo.tasks import read_out
from training.attention import BLOCK, plain_attention
from training.prompt import batch_of
from training.read import slip
from training.words import tokenizer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [2, 4])
def test_plain_attention_is_attention(causal, groups):
    generator = torch.Generator().manual_seed(0)
    length = BLOCK + 30
    query = torch.randn(2, 4, length, 8, generator=generator)
    key, value = (torch.randn(2, groups, length, 8, generator=generator) for _ in range(2))
    module = nn.Module()
    module.is_causal = causal
    made, _ = plain_attention(module, query, key, value, scaling=0.3)
    wanted = functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(made, wanted)


def test_slips_change_what_was_said_and_never_what_is_to_be_said(monkeypatch):
    monkeypatch.setattr("training.read.SLIPS", 0.5)
    words = tokenizer()
    example = read_out(np.random.default_rng(0), "train", 20)
    clean, slipped = batch_of(words, [example]), batch_of(words, [example])
    digits = [words.get_vocab()[digit] for digit in DIGITS]
    slip(np.random.default_rng(1), slipped, digits)
    changed = clean.ids != slipped.ids
    assert torch.equal(clean.labels, slipped.labels)
    assert 15 < changed.sum() < 45
    assert (clean.labels.roll(1, 1)[changed] == clean.ids[changed]).all()
    assert np.isin(clean.ids[changed].numpy(), digits).all() and np.isin(slipped.ids[changed].numpy(), digits).all()
