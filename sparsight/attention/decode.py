"""Attention of new tokens over the entries that a layer holds, in torch: what the decode kernel computes on a GPU."""

import torch
from torch import Tensor
from torch.nn import functional


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    occupied: Tensor | None,
    recent_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Attention of the newest ``q`` tokens, whose own entries are the last ``q`` of ``n`` if there are several.

    Args:
        query: ``[B, H, q, D]``, ``H`` a multiple of ``H_kv``.
        keys: ``[B, H_kv, n, D]``.
        values: ``[B, H_kv, n, D_v]``.
        occupied: bool ``[B, H_kv, n]``, slots that hold an entry; None if all do.
        recent_mask: bool ``[B or 1, 1, q, q]``, which new tokens attend to which; None for causal.
        scaling: factor of the logits, ``D ** -0.5`` if None.

    Returns:
        ``[B, H, q, D_v]``.
    """
    packed = _pack(query, keys.shape[1])
    mask = _mask(query, keys, occupied, recent_mask)
    output = functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return output.reshape(*query.shape[:-1], -1)


def attend_and_score(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    occupied: Tensor | None,
    recent_mask: Tensor | None,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    """:func:`attend`, and the attention that each entry received from the new tokens, float32 ``[B, H_kv, n]``.

    Query heads that share a KV head are averaged.
    """
    kv_heads = keys.shape[1]
    logits = _pack(query, kv_heads).float() @ keys.float().mT * (scaling or query.shape[-1] ** -0.5)
    mask = _mask(query, keys, occupied, recent_mask)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1)
    output = (weights.to(values.dtype) @ values).reshape(*query.shape[:-1], -1)
    group = query.shape[1] // kv_heads
    if recent_mask is not None:
        # The last token attends to every other except padding, whose queries do not count.
        weights = weights * recent_mask[:, :, -1].repeat(1, 1, group)[..., None]
    return output, weights.sum(2) / group


def _pack(query: Tensor, kv_heads: int) -> Tensor:
    """Queries ``[B, H_kv, G * q, D]``: the query heads of a group share one KV head, no key is repeated."""
    batch, heads, count, size = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * count, size)


def _mask(query: Tensor, keys: Tensor, occupied: Tensor | None, recent_mask: Tensor | None) -> Tensor | None:
    """Which entries the packed queries attend to, bool ``[B, 1 or H_kv, 1 or G * q, n]``; None for all."""
    (batch, heads, count, _), (_, kv_heads, length, _) = query.shape, keys.shape
    mask = None if occupied is None else occupied[:, :, None]
    if count == 1:
        return mask
    if recent_mask is None:
        recent_mask = torch.ones(1, 1, count, count, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        mask = recent_mask.new_ones(batch, 1, 1, length)
    before = mask[..., :-count].expand(-1, -1, count, -1)
    mask = torch.cat([before, recent_mask.expand(batch, before.shape[1], -1, -1)], dim=-1)
    return mask.repeat(1, 1, heads // kv_heads, 1)
