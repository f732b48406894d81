"""Scores and sparsity of one layer from the query rows that matter, in bounded memory: no ``T x T`` tensor."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sparsight import kernels

BLOCK_KEYS = 4096
"""Keys that are worked on together: more than that take a second pass."""

Hide = Callable[[slice, Tensor], None]
"""Sets logits ``[h, group * r, c]`` of keys in a slice to -inf where a query does not see the key."""


def attention_sums(
    query: Tensor, key: Tensor, scaling: float, threshold: float | None = None, visible: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention that each key receives from some queries of one sequence, and how sparse their rows are.

    ``A[h, i, :] = softmax(scaling * query[h, i] . key)`` over the keys that query ``i`` sees. Query heads that
    share a KV head are averaged into it. Products and sums are float32 for every dtype.

    Args:
        query: ``[H, R, D]``, after RoPE: the queries of the last ``R`` of the ``S`` positions, or any with ``visible``.
        key: ``[H_kv, S, D]``, after RoPE; ``H`` is a multiple of ``H_kv``.
        scaling: factor of the logits.
        threshold: ``p`` of the threshold filter (VL-Cache, arXiv 2410.23317, equation 1).
        visible: bool ``[R, S]``, the keys that each query sees, at least one; None for those up to its own position.

    Returns:
        The column sums ``sum_i A[h, i, j]``, float32 ``[H_kv, S]``; and with a threshold the number of weights that the
        filter zeroes, ``A[h, i, j] < p * max_j A[h, i, j]``, in all query heads, int64 scalar.
    """
    compute = kernels.attention_sums if kernels.usable(query, key) else _blocked_sums
    sums, survivors = compute(query, key, scaling, threshold, visible)
    if threshold is None:
        return sums, None
    # Of the visible weights the filter zeroes all but the survivors.
    return sums, visible_pairs(query.shape[1], key.shape[1], visible) * len(query) - survivors


def visible_pairs(rows: int, keys: int, visible: Tensor | None = None) -> Tensor | int:
    """Pairs of a query and a key that it sees, in one head, for what :func:`attention_sums` is given."""
    return rows * (keys - rows) + rows * (rows + 1) // 2 if visible is None else visible.sum()


def _blocked_sums(
    query: Tensor, key: Tensor, scaling: float, threshold: float | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Column sums, and how many weights survive the threshold filter in all query heads, block by block."""
    kv_heads, keys, size = key.shape
    rows = query.shape[1]
    query = query.unflatten(0, (kv_heads, -1))
    group = query.shape[1]
    sums = torch.zeros(kv_heads, keys, device=key.device)
    survivors = torch.zeros((), dtype=torch.int64, device=key.device)
    for heads, block in _query_blocks(kv_heads, group, rows, min(keys, BLOCK_KEYS), size, key.device):
        queries = (query[heads, :, block].float() * scaling).flatten(1, 2)
        if visible is None:
            first, stop = keys - rows + block.start, keys - rows + block.stop
            hide = partial(_hide_later, first, group)
        else:
            stop = keys
            hide = partial(_hide_unseen, visible[block], group)
        columns = [slice(start, min(start + BLOCK_KEYS, stop)) for start in range(0, stop, BLOCK_KEYS)]
        for column, weights, top in _weights(queries, key[heads], hide, columns):
            sums[heads, column] += weights.sum(1) / group
            if threshold is not None:
                survivors += weights.ge_(threshold * top).sum().long()
    return sums, survivors


def _weights(queries: Tensor, key: Tensor, hide: Hide, columns: list[slice]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Attention weights of a block of queries, some columns of keys at a time, and the largest weight of each row."""
    if len(columns) == 1:
        weights = _logits(queries, key, hide, columns[0]).softmax(-1)
        yield columns[0], weights, weights.amax(-1, keepdim=True)
        return
    # Too many keys for one product: a first pass finds each row's maximum and normaliser.
    maximum = normaliser = torch.full((), -torch.inf, device=key.device)
    for column in columns:
        logits = _logits(queries, key, hide, column)
        maximum = torch.maximum(maximum, logits.amax(-1, keepdim=True))
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1, keepdim=True))
    for column in columns:
        logits = _logits(queries, key, hide, column)
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


def _logits(queries: Tensor, key: Tensor, hide: Hide, column: slice) -> Tensor:
    """Logits ``[h, group * r, c]`` of a block of queries and the keys in ``column``, -inf where one is not seen."""
    logits = queries @ key[:, column].float().mT
    hide(column, logits)
    return logits


def _hide_unseen(visible: Tensor, group: int, column: slice, logits: Tensor) -> None:
    """Hide the keys that queries do not see by ``visible`` ``[r, S]``."""
    logits.masked_fill_(~visible[:, column].repeat(group, 1), -torch.inf)


def _hide_later(first: int, group: int, column: slice, logits: Tensor) -> None:
    """Hide the keys later than each of the queries from position ``first`` on."""
    seen_by_all = min(max(first + 1 - column.start, 0), logits.shape[-1])
    later = torch.arange(column.start + seen_by_all, column.stop, device=logits.device)
    positions = torch.arange(first, first + logits.shape[1] // group, device=logits.device).repeat(group)
    logits[..., seen_by_all:].masked_fill_(later > positions[:, None], -torch.inf)
