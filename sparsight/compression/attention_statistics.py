"""Scores and sparsity of one layer from the query rows that matter, in bounded memory: no ``T x T`` tensor."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sparsight.attention import kernels

BLOCK_KEYS = 2**15
"""Keys that are worked on together: more than that take a second pass."""

BLOCK_ELEMENTS = 2**18
"""Weights that a thread works on together on a CPU, unless the rows get too few: 1 MiB stays in its caches."""

BLOCK_ROWS = 64
"""Rows that are worked on together on a CPU at least, as far as there are so many: products of fewer are slow."""

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
    if kernels.usable(query, key):
        sums, survivors = kernels.attention_sums(query, key, scaling, threshold, visible)
    else:
        sums, survivors = _blocked_sums(query, key, scaling, threshold, query.shape[1], visible)
    if threshold is None:
        return sums, None
    # Of the visible weights the filter zeroes all but the survivors.
    return sums, visible_pairs(query.shape[1], key.shape[1], visible) * len(query) - survivors


def attend_and_sum(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, threshold: float | None = None, counted: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal attention, and what :func:`attention_sums` returns for it, in one pass.

    Args:
        query: ``[H, R, D]``, after RoPE: the queries of the last ``R`` of the ``S`` positions.
        key: ``[H_kv, S, D]``, after RoPE; ``H`` is a multiple of ``H_kv``.
        value: ``[H_kv, S, D_v]``.
        scaling: factor of the logits.
        threshold: ``p`` of the threshold filter.
        counted: how many of the queries, the last ones, the zeroed weights are counted of.

    Returns:
        The attention ``[H, R, D_v]``, in the dtype of the values; the column sums over all of the queries; and the
        number of zeroed weights.
    """
    output = value.new_empty(len(key), len(query) // len(key), query.shape[1], value.shape[-1])
    sums, survivors = _blocked_sums(query, key, scaling, threshold, counted, value=value, output=output)
    zeroed = None if threshold is None else visible_pairs(counted, key.shape[1]) * len(query) - survivors
    return output.flatten(0, 1), sums, zeroed


def visible_pairs(rows: int, keys: int, visible: Tensor | None = None) -> Tensor | int:
    """Pairs of a query and a key that it sees, in one head, for what :func:`attention_sums` is given."""
    return rows * (keys - rows) + rows * (rows + 1) // 2 if visible is None else visible.sum()


def _blocked_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    threshold: float | None,
    counted: int,
    visible: Tensor | None = None,
    value: Tensor | None = None,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Column sums, and how many weights of the last ``counted`` rows survive the filter in all query heads.

    With values ``[H_kv, S, D_v]``, what the weights make of them goes to ``output`` ``[H_kv, group, R, D_v]``.
    """
    kv_heads, keys, size = key.shape
    rows = query.shape[1]
    query = query.unflatten(0, (kv_heads, -1))
    group = query.shape[1]
    sums = torch.zeros(kv_heads, keys, device=key.device)
    survivors = torch.zeros((), dtype=torch.int64, device=key.device)
    width = min(keys, BLOCK_KEYS)
    head_step, row_step = _steps(kv_heads, group, rows, width, size, key.device)
    blocks = [slice(row, min(row + row_step, rows)) for row in range(0, rows, row_step)]
    # One place for the weights of all blocks: fresh memory costs more than some of the steps.
    space = torch.empty(head_step * group * row_step * width, device=key.device)
    for head in range(0, kv_heads, head_step):
        heads = slice(head, head + head_step)
        states, values = key[heads], value[heads] if value is not None else None
        if keys <= BLOCK_KEYS:
            # Every block reads all keys: they are converted once.
            states, values = states.float(), values.float() if values is not None else None
        for block in blocks:
            queries = (query[heads, :, block].float() * scaling).flatten(1, 2)
            if visible is None:
                first, stop = keys - rows + block.start, keys - rows + block.stop
                hide = partial(_hide_later, first, group)
            else:
                stop = keys
                hide = partial(_hide_unseen, visible[block], group)
            columns = [slice(start, min(start + BLOCK_KEYS, stop)) for start in range(0, stop, BLOCK_KEYS)]
            # Rows in front of those that count.
            before = max(rows - counted - block.start, 0)
            filtered = threshold is not None and before < block.stop - block.start
            attended = torch.zeros((), device=key.device)
            for column, weights, top in _weights(queries, states, hide, columns, filtered, space):
                sums[heads, column] += weights.sum(1)
                if values is not None:
                    attended = attended + weights @ values[:, column].float()
                if top is not None:
                    # In place: the weights have served.
                    counting = weights.unflatten(1, (group, -1))[:, :, before:]
                    least = top.unflatten(1, (group, -1))[:, :, before:] * threshold
                    survivors += counting.ge_(least).sum().long()
            if output is not None:
                output[heads, :, block] = attended.unflatten(1, (group, -1))
    return sums.div_(group), survivors


def _weights(
    queries: Tensor, key: Tensor, hide: Hide, columns: list[slice], tops: bool, space: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Attention weights of a block of queries, some columns of keys at a time, and each row's largest if ``tops``.

    They lie in ``space``, until the next ones do.
    """
    if len(columns) == 1:
        logits = _logits(queries, key, hide, columns[0], space)
        weights = torch.softmax(logits, -1, out=logits)
        yield columns[0], weights, weights.amax(-1, keepdim=True) if tops else None
        return
    # Too many keys for one product: a first pass finds each row's maximum and normaliser.
    maximum = normaliser = torch.full((), -torch.inf, device=key.device)
    for column in columns:
        logits = _logits(queries, key, hide, column, space)
        maximum = torch.maximum(maximum, logits.amax(-1, keepdim=True))
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1, keepdim=True))
    for column in columns:
        logits = _logits(queries, key, hide, column, space)
        yield column, logits.sub_(normaliser).exp_(), (maximum - normaliser).exp() if tops else None


def _steps(kv_heads: int, group: int, rows: int, keys: int, size: int, device: torch.device) -> tuple[int, int]:
    """KV heads and rows that are worked on together: temporaries are as large as it pays to be."""
    if device.type == "cpu":
        # A head a thread at least, as many for each.
        threads, elements, least = torch.get_num_threads(), BLOCK_ELEMENTS, BLOCK_ROWS // group
    else:
        # A temporary should fill the device: 64 MiB.
        threads, elements, least = 1, 2**24, 1
    row_step = min(max(elements // (group * keys), least, 1), rows)
    head_step = threads * max(1, elements // max(group * row_step * keys, keys * size))
    return min(head_step, kv_heads), row_step


def _logits(queries: Tensor, key: Tensor, hide: Hide, column: slice, space: Tensor) -> Tensor:
    """Logits ``[h, group * r, c]`` of a block of queries and the keys in ``column``, -inf where one is not seen."""
    states = key[:, column].float()
    shape = *queries.shape[:2], states.shape[1]
    logits = torch.bmm(queries, states.mT, out=space[: math.prod(shape)].view(shape))
    hide(column, logits)
    return logits


def _hide_unseen(visible: Tensor, group: int, column: slice, logits: Tensor) -> None:
    """Hide the keys that queries do not see by ``visible`` ``[r, S]``."""
    logits.masked_fill_(~visible[:, column].repeat(group, 1), -torch.inf)


def _hide_later(first: int, group: int, column: slice, logits: Tensor) -> None:
    """Hide the keys later than each of the queries from position ``first`` on."""
    seen_by_all = min(max(first + 1 - column.start, 0), logits.shape[-1])
    unseen = torch.ones(
        logits.shape[1] // group, logits.shape[-1] - seen_by_all, dtype=torch.bool, device=logits.device
    )
    # Query i sees the keys up to first + i.
    unseen = unseen.triu_(first + 1 - column.start - seen_by_all)
    logits.unflatten(1, (group, -1))[..., seen_by_all:].masked_fill_(unseen, -torch.inf)
