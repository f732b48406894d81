"""Scores and sparsity of one layer from the query rows that matter, in bounded memory: no ``T x T`` tensor."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_KEYS = 4096
"""Keys that are worked on together: more than that take a second pass."""


def attention_sums(
    query: Tensor, key: Tensor, scaling: float, threshold: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention that each key receives from the last queries of one causal sequence, and how sparse their rows are.

    ``A[h, i, :] = softmax(scaling * query[h, i] . key)`` over the keys up to the query's own position. Query heads that
    share a KV head are averaged into it. Products and sums are float32 for every dtype.

    Args:
        query: ``[H, R, D]``, the queries of the last ``R`` of the ``S`` positions, after RoPE.
        key: ``[H_kv, S, D]``, after RoPE; ``H`` is a multiple of ``H_kv``.
        scaling: factor of the logits.
        threshold: ``p`` of the threshold filter (VL-Cache, arXiv 2410.23317, equation 1).

    Returns:
        The column sums ``sum_i A[h, i, j]``, float32 ``[H_kv, S]``; and with a threshold the number of weights that the
        filter zeroes, ``A[h, i, j] < p * max_j A[h, i, j]``, in all query heads, int64 scalar.
    """
    kv_heads, keys, size = key.shape
    rows = query.shape[1]
    query = query.unflatten(0, (kv_heads, -1))
    group = query.shape[1]
    sums = torch.zeros(kv_heads, keys, device=key.device)
    survivors = torch.zeros((), dtype=torch.int64, device=key.device)
    for heads, block in _query_blocks(kv_heads, group, rows, min(keys, BLOCK_KEYS), size, key.device):
        first, stop = keys - rows + block.start, keys - rows + block.stop
        queries = (query[heads, :, block].float() * scaling).flatten(1, 2)
        columns = [slice(start, min(start + BLOCK_KEYS, stop)) for start in range(0, stop, BLOCK_KEYS)]
        for column, weights, top in _weights(queries, key[heads], first, columns, group):
            sums[heads, column] += weights.sum(1) / group
            if threshold is not None:
                survivors += weights.ge_(threshold * top).sum().long()
    if threshold is None:
        return sums, None
    # Of the causally visible weights the filter zeroes all but the survivors.
    visible = rows * (keys - rows) + rows * (rows + 1) // 2
    return sums, visible * kv_heads * group - survivors


def _weights(
    queries: Tensor, key: Tensor, first: int, columns: list[slice], group: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Attention weights of a block of queries, some columns of keys at a time, and the largest weight of each row."""
    if len(columns) == 1:
        weights = _logits(queries, key, first, columns[0], group).softmax(-1)
        yield columns[0], weights, weights.amax(-1, keepdim=True)
        return
    # Too many keys for one product: a first pass finds each row's maximum and normaliser.
    maximum = normaliser = torch.full((), -torch.inf, device=key.device)
    for column in columns:
        logits = _logits(queries, key, first, column, group)
        maximum = torch.maximum(maximum, logits.amax(-1, keepdim=True))
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1, keepdim=True))
    for column in columns:
        logits = _logits(queries, key, first, column, group)
        yield column, logits.sub_(normaliser).exp_(), (maximum - normaliser).exp()


def _query_blocks(
    kv_heads: int, group: int, rows: int, keys: int, size: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """KV heads and query rows that are worked on together, so that no temporary is larger than it pays to be."""
    # On a CPU a temporary should stay in its caches, on a GPU it should fill the device: 1 MiB and 64 MiB of float32.
    elements = 2**18 if device.type == "cpu" else 2**24
    row_step = max(1, min(rows, elements // (group * keys)))
    head_step = max(1, elements // max(group * row_step * keys, keys * size))
    for head in range(0, kv_heads, head_step):
        for row in range(0, rows, row_step):
            yield slice(head, head + head_step), slice(row, min(row + row_step, rows))


def _logits(queries: Tensor, key: Tensor, first: int, column: slice, group: int) -> Tensor:
    """Causal logits ``[h, group * r, c]`` of ``r`` queries from position ``first`` on and the keys in ``column``."""
    logits = queries @ key[:, column].float().mT
    seen_by_all = min(max(first + 1 - column.start, 0), logits.shape[-1])
    later = torch.arange(column.start + seen_by_all, column.stop, device=key.device)
    positions = torch.arange(first, first + queries.shape[1] // group, device=key.device).repeat(group)
    logits[..., seen_by_all:].masked_fill_(later > positions[:, None], -torch.inf)
    return logits
