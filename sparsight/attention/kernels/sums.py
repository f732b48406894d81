"""Attention sums and threshold counts in two passes over the keys; no weight is ever stored.

Rows are the queries of all heads that share a KV head, ``row = i * group + g`` for query ``i`` of the group's head
``g``: so a key is read once for all of them, and the rows that are worked on together end at nearly the same key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""Programs that fill a GPU: the first pass splits the keys until there are as many."""


def attention_sums(
    query: Tensor, key: Tensor, scaling: float, threshold: float | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Column sums of attention, and how many weights survive the threshold filter.

    Args:
        query: ``[H, R, D]``, the queries of the last ``R`` of the ``S`` positions, or any with ``visible``.
        key: ``[H_kv, S, D]``.
        scaling: factor of the logits.
        threshold: a weight survives from this fraction of its row's largest on; None to count nothing.
        visible: bool ``[R, S]``, the keys that each query sees, at least one; None for those up to its own position.

    Returns:
        The sums ``[H_kv, S]``, float32, a mean over the query heads that share a KV head; and the number of survivors
        in all query heads, int64 scalar.
    """
    kv_heads, keys, size = key.shape
    heads, queries, _ = query.shape
    group = heads // kv_heads
    rows = queries * group
    query, key = (states if states.stride(-1) == 1 else states.contiguous() for states in (query, key))
    # Any tensor will do where no mask is read.
    mask = key if visible is None else visible.contiguous().view(torch.uint8)
    blocks = {"SIZE": max(16, triton.next_power_of_2(size)), "MASKED": visible is not None}
    blocks |= {"ROWS": 64, "KEYS": 64} if size <= 128 and key.dtype != torch.float32 else {"ROWS": 32, "KEYS": 32}
    row_blocks, key_blocks = triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(keys, blocks["KEYS"])
    splits = min(key_blocks, triton.cdiv(PROGRAMS, row_blocks * kv_heads))
    shape = (queries, keys, group, size, *query.stride()[:2], *key.stride()[:2], mask.stride(0))
    maxima, normalisers = torch.empty(2, splits, kv_heads, rows, device=key.device)
    sums = torch.empty(kv_heads, keys, device=key.device)
    survivors = torch.empty(kv_heads, key_blocks, dtype=torch.int32, device=key.device)
    with torch.cuda.device_of(key):
        _normalise[(row_blocks, kv_heads, splits)](
            query, key, mask, maxima, normalisers, scaling, *shape, triton.cdiv(key_blocks, splits), **blocks
        )
        maximum, normaliser = maxima.amax(0), normalisers.logsumexp(0)
        # A weight is compared with what the threshold leaves of its row's largest; none is twice as large as that.
        least = (maximum - normaliser).exp() * (2 if threshold is None else threshold)
        _sum_columns[(key_blocks, kv_heads)](
            query, key, mask, normaliser, least, sums, survivors, scaling, *shape, **blocks
        )
    return sums, survivors.sum()


@triton.jit
def _normalise(
    query, key, visible, maxima, normalisers, scaling,
    queries, keys, group, size, query_head, query_step, key_head, key_step, visible_step, split_blocks,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Maximum of each row's logits, and logarithm of the sum of their exponentials, over one split of the keys."""
    head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = _queries(query, row, head, queries, group, size, query_head, query_step, SIZE)
    stop = tl.minimum((split + 1) * split_blocks * KEYS, keys)
    if not MASKED:
        last = tl.minimum((tl.program_id(0) * ROWS + ROWS - 1) // group, queries - 1)
        stop = tl.minimum(stop, keys - queries + last + 1)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(split * split_blocks * KEYS, stop, KEYS):
        column = start + tl.arange(0, KEYS)
        states = _keys(key, column, head, keys, size, key_head, key_step, SIZE)
        logits = _logits(own, states, row, column, visible, scaling, queries, keys, group, visible_step, MASKED)
        larger = tl.maximum(maximum, tl.max(logits, 1))
        # A row that has seen no key yet has no largest logit to take away.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        maximum = larger
    place = (split * tl.num_programs(1) + head) * queries * group + row
    tl.store(maxima + place, maximum, row < queries * group)
    seen_any = maximum > float("-inf")
    normaliser = tl.where(seen_any, maximum + tl.log(tl.where(seen_any, total, 1.0)), float("-inf"))
    tl.store(normalisers + place, normaliser, row < queries * group)


@triton.jit
def _sum_columns(
    query, key, visible, normalisers, least, sums, survivors, scaling,
    queries, keys, group, size, query_head, query_step, key_head, key_step, visible_step,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum of the weights of each key of a block, and how many of them are not less than the ``least`` of their row."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = block * KEYS + tl.arange(0, KEYS)
    states = _keys(key, column, head, keys, size, key_head, key_step, SIZE)
    rows = queries * group
    # Earlier queries see none of these keys.
    first = 0 if MASKED else tl.maximum(block * KEYS - (keys - queries), 0) * group
    total = tl.zeros([KEYS], tl.float32)
    count = tl.zeros([KEYS], tl.int32)
    for start in range(first, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        own = _queries(query, row, head, queries, group, size, query_head, query_step, SIZE)
        logits = _logits(own, states, row, column, visible, scaling, queries, keys, group, visible_step, MASKED)
        normaliser = tl.load(normalisers + head * rows + row, row < rows, other=float("inf"))
        weights = tl.exp(logits - normaliser[:, None])
        total += tl.sum(weights, 0)
        enough = tl.load(least + head * rows + row, row < rows, other=2.0)
        count += tl.sum((weights >= enough[:, None]).to(tl.int32), 0)
    tl.store(sums + head * keys + column, total / group, column < keys)
    tl.store(survivors + head * tl.num_programs(0) + block, tl.sum(count, 0))


@triton.jit
def _queries(query, row, head, queries, group, size, query_head, query_step, SIZE: tl.constexpr):
    """Queries of some rows, ``[ROWS, SIZE]``."""
    place = (head * group + row % group) * query_head + (row // group) * query_step
    element = tl.arange(0, SIZE)
    inside = (row < queries * group)[:, None] & (element < size)[None, :]
    return tl.load(query + place[:, None] + element[None, :], inside, other=0.0)


@triton.jit
def _keys(key, column, head, keys, size, key_head, key_step, SIZE: tl.constexpr):
    """Keys of some columns, ``[KEYS, SIZE]``."""
    element = tl.arange(0, SIZE)
    inside = (column < keys)[:, None] & (element < size)[None, :]
    return tl.load(key + head * key_head + column[:, None] * key_step + element[None, :], inside, other=0.0)


@triton.jit
def _logits(own, states, row, column, visible, scaling, queries, keys, group, visible_step, MASKED: tl.constexpr):
    """Logits ``[ROWS, KEYS]``, -inf where a query does not see a key."""
    position = (row // group)[:, None]
    seen = (column < keys)[None, :] & (position < queries)
    if MASKED:
        seen = seen & (tl.load(visible + position.to(tl.int64) * visible_step + column[None, :], seen, other=0) != 0)
    else:
        seen = seen & (column[None, :] <= keys - queries + position)
    return tl.where(seen, tl.dot(own, tl.trans(states), input_precision="ieee") * scaling, float("-inf"))
