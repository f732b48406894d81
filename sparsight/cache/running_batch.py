"""The sequences that decode together: their entries lie in one pool, and each joins and leaves on its own."""

import bisect
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from sparsight.attention import decode, kernels
from sparsight.attention.interface import mark, override_attention
from sparsight.cache.compressed_cache import CompressedCache, compressible, language_part
from sparsight.cache.kv_pool import KVPool
from sparsight.cache.kv_store import KVStore
from sparsight.cache.pool_rows import Group, Member, Rows, Strip, rounded_up
from sparsight.cache.step_metadata import Lengths
from sparsight.compression.eviction import VACANT, EvictionRule, EvictionState

GATHERED_RUNS, GATHERED_SLOTS = 4, 512
"""On a CPU, more runs of sequences than this, with rows no longer than that, are copied for one attention."""


class _Layer(CacheLayerMixin):
    """A layer as transformers sees it; :class:`RunningBatch` has the entries of all layers."""

    is_sliding = False
    is_compileable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new entries unchanged."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Positions are given to the model, so this is not asked for them."""
        return 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask of a single token is ignored."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class RunningBatch(Cache):
    """The cache for one decode step of all running sequences.

    :meth:`join` moves a sequence here once its prompt is compressed; :meth:`leave` returns its slots. Between them
    :meth:`advance` and one call of the model, with a token of each sequence, are a decode step. A sequence gets what it
    would get alone, as it shares no tensor with the others but the pool. Sequences of different methods may run
    together.

    Args:
        model: an unmodified transformers model, all of whose layers can be compressed.
        max_bytes: size of the pool.

    Attributes:
        pool: the pool, once the first sequence has joined.
        members: the running sequences, in the order of the batch.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int) -> None:
        config = language_part(model).config
        self._count = len(compressible(config))
        super().__init__(layers=[_Layer() for _ in range(self._count)])
        self.max_bytes = max_bytes
        self.pool: KVPool | None = None
        self.members: list[Member] = []
        self._override = override_attention(config)
        self._device = model.device
        self._start(0)

    def _start(self, heads: int) -> None:
        """Begin without a sequence.

        ``_rows`` is int64 ``[5, L, B * heads]``: of each row its start, capacity, entries held, slots used, and the
        place in the pool that its newest entry takes.
        """
        self._heads = heads
        self._rows = torch.zeros(5, self._count, 0, dtype=torch.int64, device=self._device)
        whole = self._rows[0]
        number = whole.double()
        self._state = EvictionState(number, number, number, whole, whole.int(), number.new_empty(0))
        self._position = torch.zeros(0, dtype=torch.int64, device=self._device)

    # Sequences that join and leave

    @torch.no_grad()
    def join(self, cache: CompressedCache, tokens: int, sequence: int = 0) -> int | None:
        """Copy a sequence of a cache here, with room for ``tokens`` more.

        Args:
            cache: has seen its prompt, or a new turn, and nothing more.
            tokens: the longest answer, less the token that is known already.
            sequence: which of the cache's sequences.

        Returns:
            Its place in the order of the batch, which is that of the extents; None if the pool has no gap for it.
        """
        layers, rule = cache.compressed, cache.recipe.decode
        for layer in layers:
            layer.drop_excess()
        stores = [layer.store for layer in layers if layer.store is not None]
        states = [layer.eviction for layer in layers if layer.eviction is not None]
        if self.pool is None:
            self.pool = KVPool(stores[0], self.max_bytes)
            self._start(stores[0].heads)
        seen = layers[0].seen
        growth = [rule.growth(*each, seen, tokens) for each in zip(stores, states, strict=True)]
        rows = stores[0].rows_of(sequence)
        held = torch.stack([store.held[rows] for store in stores])
        capacities = held + torch.tensor(growth, device=held.device)[:, None]
        capacities = rounded_up(capacities)
        slots = int(capacities.sum())
        start = self.pool.allocate(slots)
        if start is None:
            return None
        starts = start + capacities.flatten().cumsum(0).view_as(capacities) - capacities
        place = bisect.bisect([member.start for member in self.members], start)
        inserted = partial(_inserted, place * self._heads)
        try:
            for each in zip(stores, states, starts, strict=True):
                self._fill(*each, sequence)
            numbers = inserted([self._rows, torch.stack([starts, capacities, held, held, starts])])
            own = EvictionState.combine(states, lambda each: torch.stack(each)[:, rows])
            state = EvictionState.combine([self._state, own], inserted)
            position = _inserted(place, [self._position, self._position.new_tensor([seen - 1])])
        except Exception:
            self.pool.free(start)
            raise
        self._rows, self._state, self._position = numbers, state, position
        recalls = [layer.recalls[sequence] for layer in layers if layer.recalls]
        self.members.insert(place, Member(start, slots, rule, starts.tolist(), capacities.tolist(), recalls))
        self._regroup()
        return place

    def _fill(self, store: KVStore, state: EvictionState, starts: Tensor, sequence: int) -> None:
        """Copy a sequence's entries in a layer to the rows of the pool that begin at ``starts`` ``[H_kv]``."""
        pool, slots = self._pool(), store.slots_of(sequence)
        occupied = (store.flat_positions[slots] != VACANT).nonzero()[:, 0] + slots.start
        held = store.held[store.rows_of(sequence)]
        places = torch.arange(len(occupied), device=occupied.device)
        places += (starts - held.cumsum(0) + held).repeat_interleave(held)
        pool.keys[places] = store.keys.view(-1, store.keys.shape[-1])[occupied]
        pool.values[places] = store.values.view(-1, store.values.shape[-1])[occupied]
        pool.positions[places] = store.flat_positions[occupied]
        if state.scores.shape[1]:
            pool.scores[places] = store.flattened(state.scores)[occupied]

    def bytes_of(self, index: int) -> int:
        """Bytes of the pool that a sequence has."""
        return self.members[index].slots * self._pool().slot_bytes

    def positions_held(self, index: int) -> tuple[Tensor, ...]:
        """Positions in the slots of each KV head of a sequence, on the CPU: all of a layer, then the next layer's.

        Each is int32 ``[slots]``, -1 where a slot is vacant.
        """
        member = self.members[index]
        extent = self._pool().positions[member.start : member.start + member.slots].cpu()
        return extent.split([capacity for layer in member.capacities for capacity in layer])

    def leave(self, index: int) -> None:
        """Drop a sequence and return its slots."""
        self._pool().free(self.members.pop(index).start)
        others = torch.arange(len(self._position), device=self._device) != index
        rows = others.repeat_interleave(self._heads)
        self._rows, self._position = self._rows[..., rows], self._position[others]
        self._state = EvictionState.combine([self._state], lambda each: each[0][:, rows])
        self._regroup()

    def _regroup(self) -> None:
        """Sort the rows by the rule that decides about them, and find the sequences that one attention can take."""
        by_rule: dict[EvictionRule, list[int]] = {}
        for index, member in enumerate(self.members):
            by_rule.setdefault(member.rule, []).append(index)
        self._groups = []
        for rule, indices in by_rule.items():
            every = torch.tensor(indices)[:, None] * self._heads + torch.arange(self._heads)
            # A slice takes no copies.
            columns = slice(None) if len(by_rule) == 1 else every.flatten().to(self._device)
            longest = max(max(map(max, self.members[index].capacities)) for index in indices)
            state = EvictionState.combine([self._state], partial(_columns, columns))
            self._groups.append(Group(rule, columns, longest, state))
        ends = [
            index
            for index, (member, other) in enumerate(zip(self.members, self.members[1:], strict=False), 1)
            if not member.is_followed_by(other)
        ]
        self._runs = [range(*pair) for pair in pairwise([0, *ends, len(self.members)])]
        self._extents: tuple[list[list[int]], list[list[int]]] | None = None
        self._due: list[int] | None = None
        # Copies of short rows cost less than an attention for each of many runs.
        short = all(group.longest <= GATHERED_SLOTS and not group.rule.tracks_attention for group in self._groups)
        self._gathers = short and len(self._runs) > GATHERED_RUNS

    # A decode step

    @torch.no_grad()
    def advance(self) -> None:
        """Choose the slots of each sequence's next token, in all layers at once."""
        pool = self._pool()
        self._position = self._position + 1
        positions = self._position.int().repeat_interleave(self._heads)
        starts, _, held, used, places = self._rows
        slots, grows = torch.empty_like(starts), torch.empty_like(starts, dtype=torch.bool)
        for group in self._groups:
            rows = Rows(pool, self._heads, self._rows[:4, :, group.columns].flatten(1), group.longest)
            if group.rule.tracks_attention:
                group.state.scores = rows.by_row(pool.scores, 0)
            seen = (positions[group.columns] + 1).double().repeat(self._count)
            more = group.rule.grows(rows.held, group.state, seen)
            slots[:, group.columns] = group.rule.slots(rows, group.state, more).view(self._count, -1)
            grows[:, group.columns] = more.view(self._count, -1)
        Lengths(held, used).grow(grows, slots)
        torch.add(starts, slots, out=places)
        pool.positions[places.flatten()] = positions.repeat(self._count)
        # What took the place of an entry does not inherit its score.
        pool.scores[places.flatten()] = 0
        self._extents = self._due = None
        extents = [(each.start, each.start + each.slots) for each in self.members if each.rule.tracks_attention]
        self._scores = [(start, pool.scores[start:stop].clone()) for start, stop in extents]

    def rollback(self) -> None:
        """Prepare the same step again after it failed: take back the attention that layers have added to scores."""
        for start, scores in self._scores:
            self._pool().scores[start : start + len(scores)] = scores

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: keys ``[B, H_kv, 1, D]`` go on to the attention function, marked."""
        return mark(key_states, partial(self._attend, layer_idx)), value_states

    def _attend(
        self, layer: int, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Write the new entries of a layer and attend over all entries held, ``[B, 1, H, D]``."""
        pool, places = self._pool(), self._rows[4, layer]
        pool.keys[places], pool.values[places] = key.flatten(0, 2), value.flatten(0, 2)
        scaling = kwargs.get("scaling")
        self._recall(layer, query, scaling)
        if kernels.usable(query, pool.keys, pool.values):
            output = self._attend_by_kernel(layer, query, scaling)
        elif self._gathers:
            output = self._attend_gathered(layer, query, scaling)
        else:
            each = zip(self._runs, query.split([len(run) for run in self._runs]), strict=True)
            output = torch.cat([self._attend_run(layer, run, queries, scaling) for run, queries in each])
        return output.transpose(1, 2).contiguous(), None

    def _recall(self, layer: int, query: Tensor, scaling: float | None) -> None:
        """Let decode rules fetch entries of the prompts for the newest tokens, queries ``[B, H, 1, D]``."""
        if self._due is None:
            recalling = [index for index, member in enumerate(self.members) if member.recalls]
            positions = self._position[recalling].tolist() if recalling else []
            pairs = zip(recalling, positions, strict=True)
            self._due = [index for index, position in pairs if self.members[index].recalls[0].is_due(position)]
        pool = self._pool()
        for index in self._due:
            starts = self._rows[0, layer, index * self._heads : (index + 1) * self._heads]
            storage = pool.keys, pool.values, pool.positions
            self.members[index].recalls[layer].fetch(query[index, :, 0], scaling, storage, starts)

    def _attend_gathered(self, layer: int, query: Tensor, scaling: float | None) -> Tensor:
        """One attention over copies of all rows, padded to the longest."""
        pool, longest = self._pool(), max(self._lengths()[0][layer])
        rows = Rows(pool, self._heads, self._rows[:4, layer], longest)
        index, beyond = rows.slots()
        occupied = pool.positions[index].masked_fill_(beyond, VACANT) != VACANT
        shape = query.shape[0], self._heads, longest, -1
        keys, values = (each.index_select(0, index.flatten()).view(shape) for each in (pool.keys, pool.values))
        return decode.attend(query, keys, values, occupied.view(keys.shape[:3]), None, scaling)

    def _attend_by_kernel(self, layer: int, query: Tensor, scaling: float | None) -> Tensor:
        pool, longest = self._pool(), max(group.longest for group in self._groups)
        starts, _, _, used, _ = self._rows[:, layer]
        states = query, pool.keys, pool.values, pool.positions, starts, used, longest, scaling
        tracking = [group for group in self._groups if group.rule.tracks_attention]
        if not tracking:
            return kernels.attend(*states)
        output, received = kernels.attend_and_score(*states)
        slot = torch.arange(received.shape[1], device=received.device)
        for rule, columns, *_ in tracking:
            inside = slot < used[columns, None]
            own = (starts[columns, None] + slot)[inside]
            scores = pool.scores[own]
            rule.record(scores, received[columns][inside])
            pool.scores[own] = scores
        return output

    def _attend_run(self, layer: int, run: range, query: Tensor, scaling: float | None) -> Tensor:
        """Attention of the tokens of a run of sequences ``[n, H, 1, D]``, on a CPU."""
        strips = self._strips(layer, run)
        queries = query.chunk(len(strips), dim=1)
        rule = self.members[run.start].rule
        return torch.cat([self._attend_strip(*each, rule, scaling) for each in zip(strips, queries, strict=True)], 1)

    def _attend_strip(self, strip: Strip, query: Tensor, rule: EvictionRule, scaling: float | None) -> Tensor:
        pool = self._pool()
        keys, values = strip.of(pool.keys), strip.of(pool.values)
        occupied = (strip.of(pool.positions) != VACANT) if strip.vacancies else None
        if not rule.tracks_attention:
            return decode.attend(query, keys, values, occupied, None, scaling)
        output, received = decode.attend_and_score(query, keys, values, occupied, None, scaling)
        rule.record(strip.of(pool.scores), received)
        return output

    def _strips(self, layer: int, run: range) -> list[Strip]:
        """The rows of a run in a layer: one strip where a sequence's rows have equally many slots, else one each."""
        member, heads = self.members[run.start], self._heads
        starts, capacities = member.starts[layer], member.capacities[layer]
        if member.is_even:
            used, held = (each[layer][run.start : run.stop] for each in self._lengths())
            return [Strip(starts[0], len(run), member.slots, heads, capacities[0], max(used), min(held) < max(used))]
        rows = self._rows[2:4, layer, run.start * heads : run.stop * heads].tolist()
        by_row = zip(starts, capacities, *rows, strict=True)
        return [Strip(start, 1, 0, 1, capacity, used, held < used) for start, capacity, held, used in by_row]

    def _lengths(self) -> tuple[list[list[int]], list[list[int]]]:
        """Slots used of the longest row of each sequence, and entries of the shortest, by layer."""
        if self._extents is None:
            held, used = self._rows[2:4].unflatten(2, (-1, self._heads))
            self._extents = used.amax(-1).tolist(), held.amin(-1).tolist()
        return self._extents

    def _pool(self) -> KVPool:
        assert self.pool is not None
        return self.pool


def _columns(columns: Tensor | slice, states: list[Tensor]) -> Tensor:
    """Some columns of one tensor ``[L, N]``, flattened."""
    return states[0][:, columns].flatten()


def _inserted(place: int, pair: list[Tensor]) -> Tensor:
    """The first tensor with the second at ``place`` of its last dimension."""
    first, second = pair
    return torch.cat([first[..., :place], second, first[..., place:]], dim=-1)
