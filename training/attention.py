"""Attention as plain matrix products; its backward pass on a CPU in bf16 is several times faster than the fused one."""

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "plain"
BLOCK = 256


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float = 1.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Full attention, or causal attention if the module is causal; padding must be on the right.

    `query` is `[B, H, T, D]`, `key` and `value` are `[B, G, T, D]` with H a multiple of G; returns `[B, T, H, D]`.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    causal = bool(getattr(module, "is_causal", False))
    with torch.autocast(query.device.type, enabled=False):
        query, key = (query * scaling).to(value.dtype), key.to(value.dtype).transpose(2, 3)
        parts = []
        for start in range(0, length, BLOCK if causal else length):
            end = min(start + BLOCK, length) if causal else length
            block = query[:, :, start:end].reshape(batch, groups, -1, size)
            scores = block @ key[..., :end]
            if causal:
                future = torch.full((end - start, end), -torch.inf, dtype=value.dtype, device=value.device)
                scores = scores + future.triu(start + 1).repeat(heads // groups, 1)
            parts.append((scores.softmax(-1) @ value[:, :, :end]).reshape(batch, heads, -1, size))
        return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register(NAME, plain_attention)
