"""The entries that one layer holds after compression, in storage of their own size plus room to grow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.attention import kernels

LEAST_GROWTH = 16
"""Slots by which storage grows at least when it is full."""

VACANT = -1

# Storage that is made in inference mode could not be written to outside of it.
writable = torch.inference_mode(False)


def growth_step(used: int) -> int:
    """Slots by which storage of ``used`` slots grows: an eighth, so that copying costs the same for every new token."""
    return max(LEAST_GROWTH, used // 8)


def shifted(positions: Tensor, later: int) -> Tensor:
    """Positions ``later`` by so many tokens; vacant slots stay vacant."""
    return positions.where(positions == VACANT, positions + later)


class DenseStore:
    """Keys and values of one layer, as many for each sequence as it kept.

    Sequences may hold different numbers of entries. They end at the same slot, so that new entries of all sequences
    go to the same place; slots in front of a shorter sequence are vacant.

    Attributes:
        keys, values: ``[B, H_kv, capacity, D]``.
        positions: int32 ``[B, H_kv, capacity]``, the position of each slot's token, -1 where the slot is vacant.
        held: entries of each sequence (every KV head of a sequence holds as many).
        used: slots in use: vacant ones in front included, room to grow excluded.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, held: list[int]) -> None:
        self.keys, self.values, self.positions, self.held = keys, values, positions, held
        self.used = max(held)

    @classmethod
    @writable
    def allocate(cls, held: list[int], like_keys: Tensor, like_values: Tensor) -> "DenseStore":
        """Storage for ``held[b]`` entries of each sequence, vacant yet; dtype and shape follow ``[B, H_kv, T, D]``."""
        capacity = max(held) + growth_step(max(held))
        rows, heads = len(held), like_keys.shape[1]
        # Zeros, because attention multiplies the values of vacant slots by a weight of zero.
        keys = like_keys.new_zeros(rows, heads, capacity, like_keys.shape[-1])
        values = like_values.new_zeros(rows, heads, capacity, like_values.shape[-1])
        positions = torch.full((rows, heads, capacity), VACANT, dtype=torch.int32, device=keys.device)
        return cls(keys, values, positions, held)

    def fill(self, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Put the ``held[row]`` entries that a sequence keeps, ``[H_kv, n, D]`` at ``[H_kv, n]``, in its slots."""
        slots = slice(self.used - self.held[row], self.used)
        self.keys[row, :, slots] = keys
        self.values[row, :, slots] = values
        self.positions[row, :, slots] = positions.to(torch.int32)

    @classmethod
    @writable
    def join(cls, parts: Sequence["DenseStore"], padding: Sequence[int]) -> "DenseStore":
        """The sequences of several, one after the other, those of ``parts[i]`` at positions ``padding[i]`` later."""
        joined = cls.allocate([part.used for part in parts for _ in part.held], parts[0].keys, parts[0].values)
        joined.held = [held for part in parts for held in part.held]
        row = 0
        for part, later in zip(parts, padding, strict=True):
            rows, slots = slice(row, row + len(part.held)), slice(joined.used - part.used, joined.used)
            joined.keys[rows, :, slots] = part.keys[:, :, : part.used]
            joined.values[rows, :, slots] = part.values[:, :, : part.used]
            joined.positions[rows, :, slots] = shifted(part.positions[:, :, : part.used], later)
            row = rows.stop
        return joined

    def append(self, keys: Tensor, values: Tensor, position: int, valid: Tensor | None = None) -> None:
        """Append entries ``[B, H_kv, q, D]`` at consecutive positions; bool ``valid`` ``[B, q]`` excepts padding."""
        count = keys.shape[2]
        self.reserve(count)
        slots = slice(self.used, self.used + count)
        self.keys[:, :, slots] = keys
        self.values[:, :, slots] = values
        if count == 1:
            self.positions[:, :, slots] = position
        else:
            self.positions[:, :, slots] = torch.arange(position, position + count, device=keys.device)
        added = [count] * len(self.held)
        if valid is not None:
            self.positions[:, :, slots].masked_fill_(~valid[:, None], VACANT)
            added = valid.sum(-1).tolist()
        self.held = [held + new for held, new in zip(self.held, added, strict=True)]
        self.used += count

    def put(self, keys: Tensor, values: Tensor, position: int, slots: Sequence[int], grown: Sequence[bool]) -> None:
        """:meth:`overwrite`, the same slot in all KV heads of a sequence."""
        slot = slots[0]
        if any(other != slot for other in slots):
            by_head = torch.tensor(slots, device=keys.device)[:, None].expand(-1, self.heads)
            self.overwrite(keys, values, position, by_head, grown)
            return
        self.held = [held + new for held, new in zip(self.held, grown, strict=True)]
        self.keys[:, :, slot] = keys[:, :, 0]
        self.values[:, :, slot] = values[:, :, 0]
        self.positions[:, :, slot] = position
        self.used = max(self.used, slot + 1)

    def overwrite(self, keys: Tensor, values: Tensor, position: int, slots: Tensor, grown: Sequence[bool]) -> None:
        """Write one entry a sequence, ``[B, H_kv, 1, D]``, to its slot ``[B, H_kv]``; it was vacant where ``grown``."""
        self.held = [held + new for held, new in zip(self.held, grown, strict=True)]
        index = slots[..., None]
        self.keys.scatter_(2, index[..., None].expand_as(keys), keys)
        self.values.scatter_(2, index[..., None].expand_as(values), values)
        self.positions.scatter_(2, index, position)
        self.used = max(self.used, *self.held)

    def vacate(self, slots: Tensor, dropped: Sequence[bool]) -> None:
        """Drop the entry in the slot ``[B, H_kv]`` of every sequence where ``dropped``."""
        self.held = [held - gone for held, gone in zip(self.held, dropped, strict=True)]
        index = slots[..., None]
        gone = torch.tensor(dropped, device=slots.device)[:, None, None]
        self.positions.scatter_(2, index, torch.where(gone, VACANT, self.positions.gather(2, index)))

    @writable
    def reserve(self, count: int) -> None:
        """Grow the storage, in steps, until ``count`` more entries fit."""
        missing = self.used + count - self.keys.shape[2]
        if missing <= 0:
            return
        extra = max(missing, growth_step(self.used))
        self.keys = functional.pad(self.keys, (0, 0, 0, extra))
        self.values = functional.pad(self.values, (0, 0, 0, extra))
        self.positions = functional.pad(self.positions, (0, extra), value=VACANT)

    def drop_newest(self, count: int) -> None:
        """Forget the ``count`` entries appended last."""
        slots = slice(self.used - count, self.used)
        dropped = (self.positions[:, 0, slots] != VACANT).sum(-1).tolist()
        self.positions[:, :, slots] = VACANT
        self.held = [held - lost for held, lost in zip(self.held, dropped, strict=True)]
        self.used -= count

    @writable
    def select_rows(self, index: Tensor) -> None:
        """Replace the sequences by those at ``index``, a tensor on the CPU."""
        self.held = [self.held[row] for row in index.tolist()]
        index = index.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.positions = self.positions.index_select(0, index)

    def positions_at(self, indices: Sequence[int], next_position: int) -> Tensor:
        """Position of the entry with index ``indices[b]`` in order of position, int32 ``[B, H_kv]``.

        Past the end it is the position that this entry will have if all coming entries, from ``next_position`` on, are
        appended.
        """
        # Vacant slots sort in front.
        ordered = self.positions[:, :, : self.used].sort(-1).values
        found = [
            ordered[row, :, self.used - held + index]
            if index < held
            else ordered.new_full(ordered.shape[1:2], next_position + index - held)
            for row, (held, index) in enumerate(zip(self.held, indices, strict=True))
        ]
        return torch.stack(found)

    @property
    def ends(self) -> list[int]:
        """Slots of each sequence up to the last one in use."""
        return [self.used] * len(self.held)

    @property
    def flat_positions(self) -> Tensor:
        """The positions of all slots, one after the other."""
        return self.positions.view(-1)

    def settle(self, held: list[int], ends: list[int]) -> None:
        """Take note of entries that were written without this object, and of the slots that are in use now."""
        self.held, self.used = held, max(ends)

    def rows(self) -> Tensor:
        """First slot of each KV head of each sequence, all slots counted, and slots in use, ``[2, B * H_kv]``."""
        count, capacity = len(self.held) * self.heads, self.keys.shape[2]
        places = [list(range(0, count * capacity, capacity)), [self.used] * count]
        return torch.tensor(places, device=self.keys.device)

    def whole(self) -> "DenseStore":
        """The same entries with all slots in use, so that what is in them is all that tells which are vacant."""
        entries = DenseStore(self.keys, self.values, self.positions, [0] * len(self.held))
        entries.used = self.positions.shape[2]
        return entries

    def replace(self, row: int, other: Any) -> None:
        """Put the only sequence of ``other`` in the place of one of these, whose neighbours are not touched.

        Raises:
            ValueError: it has more slots than these.
        """
        slots = other.keys.shape[2]
        if slots > self.keys.shape[2]:
            raise ValueError(
                f"A sequence with {slots} slots does not fit in the place of one with {self.keys.shape[2]}."
            )
        self.clear(row)
        self.keys[row, :, :slots], self.values[row, :, :slots] = other.keys[0], other.values[0]
        self.positions[row, :, :slots] = other.positions[0]

    def clear(self, row: int) -> None:
        """Drop all entries of a sequence, whose neighbours are not touched."""
        self.positions[row] = VACANT

    def rows_of(self, index: Tensor) -> Tensor:
        """The rows of the sequences at ``index``: each sequence is one."""
        return index

    def by_head(self, counts: Sequence[int]) -> list[list[int]]:
        """A number of each sequence, by sequence and KV head."""
        return [[count] * self.heads for count in counts]

    def attend(self, query: Tensor, recent_mask: Tensor | None, scaling: float | None) -> Tensor:
        """Attention of the newest ``q`` tokens, already taken in, over all entries held.

        Args:
            query: ``[B, H, q, D]``, ``H`` a multiple of ``H_kv``.
            recent_mask: bool ``[B, 1, q, q]``, what the new tokens see of each other; None for causal.
            scaling: factor of the logits, ``D ** -0.5`` if None.

        Returns:
            ``[B, H, q, D]``.
        """
        if query.shape[2] == 1 and kernels.usable(query, self.keys, self.values):
            return kernels.attend(query, *self.tensors, self.rows(), self.used, scaling)
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        mask = self._mask(query, recent_mask)
        output = functional.scaled_dot_product_attention(self._pack(query), keys, values, attn_mask=mask, scale=scaling)
        return output.reshape(*query.shape[:-1], -1)

    def attend_and_tell(
        self, query: Tensor, recent_mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attend`, and the attention that each slot got from tokens, float32 ``[B, H_kv, capacity]``.

        Query heads that share a KV head are averaged into it.
        """
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        packed = self._pack(query)
        logits = packed.float() @ keys.float().mT * (scaling or query.shape[-1] ** -0.5)
        mask = self._mask(query, recent_mask)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1)
        output = (weights.to(values.dtype) @ values).reshape(*query.shape[:-1], -1)
        if recent_mask is not None:
            # The last token sees every other but padding, whose queries do not count.
            tokens = recent_mask[:, :, -1].repeat(1, 1, query.shape[1] // self.heads)
            weights = weights * tokens[..., None]
        got = weights.sum(2) * self.heads / query.shape[1]
        return output, functional.pad(got, (0, self.positions.shape[2] - self.used))

    def _pack(self, query: Tensor) -> Tensor:
        """Queries ``[B, H_kv, G * q, D]``: the query heads of a group are rows of one KV head, no key is repeated."""
        batch, heads, count, size = query.shape
        return query.reshape(batch, self.heads, heads // self.heads * count, size)

    def _mask(self, query: Tensor, recent_mask: Tensor | None) -> Tensor | None:
        """Which entries the packed queries see, bool ``[B, 1 or H_kv, 1 or G * q, used]``, None for all."""
        batch, heads, count, _ = query.shape
        mask = None
        if min(self.held) < self.used:
            mask = (self.positions[:, :, None, : self.used] != VACANT).expand(-1, -1, count, -1)
        if count > 1:
            if recent_mask is None:
                recent_mask = torch.ones(1, 1, count, count, dtype=torch.bool, device=query.device).tril()
            if mask is None:
                mask = recent_mask.new_ones(batch, 1, count, self.used)
            recent_mask = recent_mask.expand(batch, mask.shape[1], -1, -1)
            mask = torch.cat([mask[..., :-count], recent_mask], dim=-1)
            mask = mask.repeat(1, 1, heads // self.heads, 1)
        return mask

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.keys.shape[1]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all sequences."""
        return self.keys[:, :, 0].nbytes + self.values[:, :, 0].nbytes

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where everything lies."""
        return self.keys, self.values, self.positions

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)
