"""Attention of new tokens over the entries that a layer holds, in torch: what the decode kernel computes on a GPU."""

from typing import NamedTuple

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


class Tiles(NamedTuple):
    """Tiles of ``W`` slots that ``N`` rows of any length use, for one attention over all of them.

    Attributes:
        tile: int64 ``[T]``, which tile of the storage each is.
        row: int64 ``[T]``, whose it is.
        place: int64 ``[T]``, its index where every row has ``longest`` tiles.
        bias: float32 ``[T, 1, W]``, -inf where a slot is vacant, otherwise 0.
        longest: tiles of the longest row.
    """

    tile: Tensor
    row: Tensor
    place: Tensor
    bias: Tensor
    longest: int


def attend_tiles(
    query: Tensor, keys: Tensor, values: Tensor, heads: int, tiles: Tiles, scaling: float | None
) -> Tensor:
    """Attention of one new token of each sequence over rows of different lengths, with float32 logits and sums.

    Args:
        query: ``[B, H, 1, D]``, ``H`` a multiple of ``heads``.
        keys: ``[slots, D]``.
        values: ``[slots, D_v]``.
        heads: KV heads, each with a row of its own: ``N = B * heads``.
        tiles: where the entries of each row are.
        scaling: factor of the logits, ``D ** -0.5`` if None.

    Returns:
        ``[B, H, 1, D_v]``.
    """
    tile, row, place, bias, longest = tiles
    packed = _pack(query, heads).flatten(0, 1).float() * (scaling or query.shape[-1] ** -0.5)
    rows, group, _ = packed.shape
    logits = torch.baddbmm(bias, packed[row], _taken(keys, tile, bias.shape[2]).float().mT)
    # The largest of each tile, then of each row: softmax over rows in parts.
    largest = logits.new_full((rows * longest, group), -torch.inf).index_copy_(0, place, logits.amax(-1))
    largest = largest.view(rows, longest, group).amax(1)
    weights = logits.sub_(largest[row][..., None]).exp_()
    sums = weights.new_zeros(rows, group).index_add_(0, row, weights.sum(-1))
    parts = torch.bmm(weights.to(values.dtype), _taken(values, tile, bias.shape[2])).float()
    output = parts.new_zeros(rows, *parts.shape[1:]).index_add_(0, row, parts)
    return output.div_(sums[..., None]).to(values.dtype).view(*query.shape[:-1], -1)


def tiled(states: Tensor, width: int) -> Tensor:
    """Storage ``[slots, ...]`` as tiles ``[tiles, width, ...]``; what is left at the end belongs to none."""
    return states[: len(states) // width * width].unflatten(0, (-1, width))


def _taken(states: Tensor, index: Tensor, width: int) -> Tensor:
    """Some tiles of ``states`` ``[slots, D]``, ``[T, width, D]``."""
    return tiled(states, width).flatten(1).index_select(0, index).view(-1, width, states.shape[-1])


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
