"""Scores and sparsity of one layer from the query rows that matter, in bounded memory: no ``T x T`` tensor."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**21
"""Elements of the largest temporary tensor: 8 MiB in float32, of which a handful live at once."""

BLOCK_KEYS = 4096


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
        filter zeroes, ``A[h, i, j] < p * max_j A[h, i, j]``, a mean over heads, float64 scalar.
    """
    kv_heads, keys, _ = key.shape
    rows = query.shape[1]
    query = query.unflatten(0, (kv_heads, -1))
    group = query.shape[1]
    sums = torch.zeros(kv_heads, keys, device=key.device)
    # Of the visible weights the filter zeroes all but the survivors.
    visible = rows * (keys - rows) + rows * (rows + 1) // 2
    survivors = torch.zeros((), dtype=torch.float64, device=key.device)
    for heads, block in _query_blocks(kv_heads, group, rows, min(keys, BLOCK_KEYS), key.shape[-1]):
        first, stop = keys - rows + block.start, keys - rows + block.stop
        queries = (query[heads, :, block].float() * scaling).flatten(1, 2)
        columns = [slice(start, min(start + BLOCK_KEYS, stop)) for start in range(0, stop, BLOCK_KEYS)]
        logits = _logits(queries, key[heads, columns[-1]], first, columns[-1].start, group)
        normaliser = logits.logsumexp(-1, keepdim=True)
        maximum = logits.amax(-1, keepdim=True)
        for column in columns[:-1]:
            logits = _logits(queries, key[heads, column], first, column.start, group)
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1, keepdim=True))
            maximum = torch.maximum(maximum, logits.amax(-1, keepdim=True))
        for column in columns:
            if len(columns) > 1:
                logits = _logits(queries, key[heads, column], first, column.start, group)
            if threshold is not None:
                # softmax is monotone: the filter needs the logits and the row maximum only.
                survivors += (logits >= maximum + math.log(threshold)).sum()
            sums[heads, column] += logits.sub_(normaliser).exp_().sum(1) / group
    if threshold is None:
        return sums, None
    return sums, visible - survivors / (kv_heads * group)


def _query_blocks(kv_heads: int, group: int, rows: int, keys: int, size: int) -> Iterator[tuple[slice, slice]]:
    """KV heads and query rows to be worked on together, so that no temporary exceeds ``BLOCK_ELEMENTS``."""
    row_step = max(1, min(rows, BLOCK_ELEMENTS // (group * keys)))
    head_step = max(1, BLOCK_ELEMENTS // max(group * row_step * keys, keys * size))
    for head in range(0, kv_heads, head_step):
        for row in range(0, rows, row_step):
            yield slice(head, head + head_step), slice(row, min(row + row_step, rows))


def _logits(queries: Tensor, key: Tensor, first_query: int, first_key: int, group: int) -> Tensor:
    """Causal logits ``[h, group * r, c]`` of queries ``[h, group * r, D]`` and keys ``[h, c, D]``."""
    logits = queries @ key.float().mT
    rows = queries.shape[1] // group
    if first_key + key.shape[1] > first_query + 1:
        query_positions = torch.arange(first_query, first_query + rows, device=key.device).repeat(group)
        key_positions = torch.arange(first_key, first_key + key.shape[1], device=key.device)
        logits.masked_fill_(key_positions > query_positions[:, None], -torch.inf)
    return logits
