"""Attention of the training code, compared with torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from training.attention import BLOCK, plain_attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [2, 4])
def test_plain_attention_equals_torch_attention(causal, groups):
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
