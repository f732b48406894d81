"""Attention of one new token over entries held, whose number differs by sequence and KV head.

Every row's entries are split among several programs, whose results are then put together (Flash-Decoding: Dao, Haziza,
Massa, Sizov, 2023).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""Programs that fill a GPU: rows are split until there are as many."""


# An operation of its own, so that torch.compile takes it as it is.
@torch.library.custom_op("sparsight::attend", mutates_args=())
def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest token, already written, over all entries held.

    A row is one KV head of one sequence, ``N = B * H_kv``.

    Args:
        query: ``[B, H, 1, D]``, ``H`` a multiple of ``H_kv``.
        keys: the rows' slots one after the other, ``[..., D]``, contiguous.
        values: the same, of any size.
        positions: int32, one for each slot, -1 where it is vacant.
        starts: int64 ``[N]``, each row's first slot.
        lengths: int64 ``[N]``, how many are in use; all may be vacant.
        longest: no row has more slots in use.
        scaling: factor of the logits.

    Returns:
        The attention ``[B, H, 1, D]``, and the logarithm of each query head's normaliser, float32 ``[B * H]``.
    """
    batch, heads, _, size = query.shape
    count, value_size = len(starts), values.shape[-1]
    group = batch * heads // count
    slots = 64 if max(size, value_size) <= 128 and keys.dtype != torch.float32 else 32
    blocks = triton.cdiv(longest, slots)
    splits = min(blocks, triton.cdiv(PROGRAMS, count))
    outputs = torch.empty(splits, count, group, value_size, device=query.device)
    normalisers = torch.empty(splits, count, group, device=query.device)
    with torch.cuda.device_of(query):
        _attend_split[(count, splits)](
            query.contiguous(), keys.view(-1, size), values.view(-1, value_size), positions.view(-1),
            starts, lengths, outputs, normalisers, scaling,
            group, size, value_size, triton.cdiv(blocks, splits),
            GROUP=max(16, triton.next_power_of_2(group)), SLOTS=slots,
            SIZE=max(16, triton.next_power_of_2(size)), VALUE_SIZE=max(16, triton.next_power_of_2(value_size)),
        )  # fmt: skip
        output = query.new_empty(batch, heads, 1, value_size)
        totals = torch.empty(batch * heads, device=query.device)
        _combine[(batch * heads,)](
            outputs, normalisers, output, totals, splits, value_size,
            SPLITS=triton.next_power_of_2(splits), VALUE_SIZE=max(16, triton.next_power_of_2(value_size)), BLOCK=16,
        )  # fmt: skip
    return output, totals


@attend.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    """The shapes of the results."""
    output = query.new_empty(*query.shape[:-1], values.shape[-1])
    return output, query.new_empty(query.shape[0] * query.shape[1], dtype=torch.float32)


@torch.library.custom_op("sparsight::received", mutates_args=())
def received(
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    normalisers: Tensor,
    longest: int,
    scaling: float,
) -> Tensor:
    """The attention that each slot received, float32 ``[N, longest]``, averaged over the query heads of a KV head.

    Arguments as for :func:`attend`, whose second result the ``normalisers`` are.
    """
    batch, heads, _, size = query.shape
    count = len(starts)
    group = batch * heads // count
    slots = 64 if size <= 128 and keys.dtype != torch.float32 else 32
    weights = torch.empty(count, longest, device=query.device)
    with torch.cuda.device_of(query):
        _received[(count, triton.cdiv(longest, slots))](
            query.contiguous(), keys.view(-1, size), positions.view(-1),
            starts, lengths, normalisers, weights, scaling,
            group, size, longest,
            GROUP=max(16, triton.next_power_of_2(group)), SLOTS=slots, SIZE=max(16, triton.next_power_of_2(size)),
        )  # fmt: skip
    return weights


@received.register_fake
def _(query: Tensor, keys: Tensor, positions: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    """The shape of the result."""
    return query.new_empty(len(starts), rest[2], dtype=torch.float32)


@triton.jit
def _received(
    query, keys, positions, starts, lengths, normalisers, weights, scaling,
    group, size, longest,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The mean weight of a row's query heads for one block of its slots."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, element = tl.arange(0, GROUP), tl.arange(0, SIZE)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    own = (head < group)[:, None] & (element < size)[None, :]
    queries = tl.load(query + (row * group + head)[:, None] * size + element[None, :], own, other=0.0)
    normaliser = tl.load(normalisers + row * group + head, head < group, other=float("inf"))
    place = tl.load(starts + row) + slot
    held = slot < tl.load(lengths + row)
    held = held & (tl.load(positions + place, held, other=-1) >= 0)
    of_key = held[:, None] & (element < size)[None, :]
    key = tl.load(keys + place[:, None] * size + element[None, :], of_key, other=0.0)
    logits = tl.dot(queries, tl.trans(key), input_precision="ieee") * scaling
    attended = (head < group)[:, None] & held[None, :]
    shares = tl.where(attended, tl.exp(logits - normaliser[:, None]), 0.0)
    tl.store(weights + row * longest + slot, tl.sum(shares, 0) / group, slot < longest)


@triton.jit
def _attend_split(
    query, keys, values, positions, starts, lengths, outputs, normalisers, scaling,
    group, size, value_size, split_blocks,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """Attention of a row's query heads over one split of its slots, and its logarithmic normaliser."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, element, value_element = tl.arange(0, GROUP), tl.arange(0, SIZE), tl.arange(0, VALUE_SIZE)
    start, length = tl.load(starts + row), tl.load(lengths + row)
    own = (head < group)[:, None] & (element < size)[None, :]
    queries = tl.load(query + (row * group + head)[:, None] * size + element[None, :], own, other=0.0)
    maximum = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    output = tl.zeros([GROUP, VALUE_SIZE], tl.float32)
    stop = tl.minimum((split + 1) * split_blocks * SLOTS, length)
    for begin in range(split * split_blocks * SLOTS, stop, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        place = start + slot
        held = slot < length
        held = held & (tl.load(positions + place, held, other=-1) >= 0)
        of_key = held[:, None] & (element < size)[None, :]
        key = tl.load(keys + place[:, None] * size + element[None, :], of_key, other=0.0)
        logits = tl.dot(queries, tl.trans(key), input_precision="ieee") * scaling
        logits = tl.where(held[None, :], logits, float("-inf"))
        larger = tl.maximum(maximum, tl.max(logits, 1))
        # Where all slots so far were vacant there is no largest logit to take away.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights, decay = tl.exp(logits - base[:, None]), tl.exp(maximum - base)
        of_value = held[:, None] & (value_element < value_size)[None, :]
        value = tl.load(values + place[:, None] * value_size + value_element[None, :], of_value, other=0.0)
        total = total * decay + tl.sum(weights, 1)
        output = output * decay[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        maximum = larger
    some = total > 0
    target = (split * tl.num_programs(0) + row) * group + head
    safe = tl.where(some, total, 1.0)
    tl.store(normalisers + target, tl.where(some, maximum + tl.log(safe), float("-inf")), head < group)
    inside = (head < group)[:, None] & (value_element < value_size)[None, :]
    tl.store(outputs + target[:, None] * value_size + value_element[None, :], output / safe[:, None], inside)


@triton.jit
def _combine(
    outputs, normalisers, output, totals, splits, value_size,
    SPLITS: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of a query head from that over each split, whose weight is its share of all normalisers."""
    target, count = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    split = tl.arange(0, SPLITS)
    each = tl.load(normalisers + split * count + target, split < splits, other=float("-inf"))
    largest = tl.max(each, 0)
    # A row without entries has nothing to attend to: its output is 0.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(each - base), 0)
    tl.store(totals + target, base + tl.log(tl.where(total > 0, total, 1.0)))
    element = tl.arange(0, VALUE_SIZE)
    sums = tl.zeros([VALUE_SIZE], tl.float32)
    for begin in range(0, splits, BLOCK):
        some = begin + tl.arange(0, BLOCK)
        weights = tl.exp(tl.load(normalisers + some * count + target, some < splits, other=float("-inf")) - base)
        inside = (some < splits)[:, None] & (element < value_size)[None, :]
        parts = tl.load(outputs + (some * count + target)[:, None] * value_size + element[None, :], inside, other=0.0)
        sums += tl.sum(weights[:, None] * parts, 0)
    sums = sums / tl.where(total > 0, total, 1.0)
    tl.store(output + target * value_size + element, sums.to(output.dtype.element_ty), element < value_size)
