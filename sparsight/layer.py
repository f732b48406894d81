"""One layer of the cache: it collects the prompt, observes it, compacts it, and then serves decoding."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsight.entries import Entries
from sparsight.observe import attention_sums
from sparsight.parts import FixedPoint, PostVision
from sparsight.parts.decode import slot_to_write
from sparsight.prompt import Prompt, Span
from sparsight.recipe import Recipe


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one layer, whole during prefill and compressed afterwards.

    Attributes:
        seen: tokens seen, padding included; positions follow it.
        keys, values: ``[B, H_kv, seen, D]`` during prefill, then None.
        scores: one score ``[H_kv, T_b]`` a sequence during prefill.
        zeroed: how many weights of each sequence's post-vision rows the threshold filter zeroes, a mean over heads.
        entries: what is held after prefill, None before.
        kept: how many prompt entries each sequence kept.
    """

    is_sliding = False

    def __init__(self, recipe: Recipe, prompt: Prompt) -> None:
        super().__init__()
        self.recipe = recipe
        self.start(prompt)

    def start(self, prompt: Prompt) -> None:
        """Forget everything and wait for ``prompt``."""
        self.prompt = prompt
        self.spans: Sequence[Span] = prompt.spans
        self.seen = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.scores: list[Tensor] = []
        self.zeroed: list[Tensor] = []
        self.entries: Entries | None = None
        self.kept: list[int] = []
        self.shares: list[float] = []
        self.padding: list[int] = []
        self.turn_tokens: list[int] = []
        self.fixed_indices: list[int] = []
        self.fixed_positions: Tensor | None = None
        self.is_initialized = False

    # Prefill

    def prefill(
        self,
        own: Callable[..., tuple[Tensor, Tensor | None]],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model's own attention over the prompt so far and observe the queries that matter."""
        self.is_initialized = True
        if self.keys is not None and self.values is not None:
            key, value = torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        self.keys, self.values = key.detach(), value.detach()
        output = own(module, query, key, value, attention_mask, **kwargs)
        self._observe(query.detach(), self.keys, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        self.seen = key.shape[2]
        return output

    def _observe(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Add the attention of the queries at positions ``[seen, seen + q)`` to the scores and the sparsity."""
        kv_heads = key.shape[1]
        if not self.scores:
            spans = self.spans
            self.scores = [torch.zeros(kv_heads, span.length, device=key.device) for span in spans]
            self.zeroed = [torch.zeros((), dtype=torch.float64, device=key.device) for _ in spans]
        threshold = self.recipe.allocate.threshold
        post_vision = PostVision()
        for row, span in enumerate(self.spans):
            score_rows = self.recipe.score.rows(span)
            shared = score_rows == post_vision.rows(span)
            sums, zeroed = self._sums(row, span, score_rows, query, key, scaling, threshold if shared else None)
            if threshold is not None and not shared:
                _, zeroed = self._sums(row, span, post_vision.rows(span), query, key, scaling, threshold)
            if sums is not None:
                self.scores[row][:, : sums.shape[1]] += sums
            if zeroed is not None:
                self.zeroed[row] += zeroed

    def _sums(
        self, row: int, span: Span, rows: range, query: Tensor, key: Tensor, scaling: float, threshold: float | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """:func:`attention_sums` of those of a sequence's ``rows`` that this call brings queries of."""
        start, stop = max(rows.start, self.seen), min(rows.stop, self.seen + query.shape[2])
        if start >= stop:
            return None, None
        queries = query[row, :, start - self.seen : stop - self.seen]
        return attention_sums(queries, key[row, :, span.start : stop], scaling, threshold)

    def sparsity(self) -> Tensor:
        """Sparsity of each sequence's post-vision rows, float64 ``[B]`` (VL-Cache, arXiv 2410.23317, section 4.1)."""
        visible = [sum(p - span.start + 1 for p in PostVision().rows(span)) for span in self.spans]
        zeroed = torch.stack(self.zeroed)
        return zeroed / torch.tensor(visible, dtype=torch.float64, device=zeroed.device)

    def compact(self, shares: list[float]) -> None:
        """Keep ``shares[b]`` of each sequence's prompt, and free the rest."""
        assert self.keys is not None and self.values is not None
        spans, reduce = self.spans, self.recipe.reduce
        self.kept = [
            min(max(1, round(share * span.length)), span.length) for share, span in zip(shares, spans, strict=True)
        ]
        entries = Entries.allocate(self.kept, self.keys, self.values)
        for row, span in enumerate(spans):
            positions = reduce.select(self.scores[row], self.kept[row])
            keys = reduce.apply(self.keys[row, :, span.start : span.stop], positions)
            values = reduce.apply(self.values[row, :, span.start : span.stop], positions)
            entries.fill(row, keys, values, positions + span.start)
        self.entries, self.shares = entries, shares
        length = self.prompt.length
        self.padding = [length - span.length for span in spans]
        self.turn_tokens = [0] * len(spans)
        beyond_keys, beyond_values = self.keys[:, :, length:], self.values[:, :, length:]
        self.keys = self.values = None
        self.scores = []
        # Assisted generation brings its first candidates together with the prompt.
        if beyond_keys.shape[2]:
            self.entries.append(beyond_keys, beyond_values, length)
        self._fix()

    # Decoding

    def decode(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None) -> Tensor:
        """Take in the new entries and attend over all entries held, ``[B, H, q, D]``."""
        assert self.entries is not None
        key, value = key.detach(), value.detach()
        count, mask = key.shape[2], None
        if count > 1:
            mask = _recent_mask(attention_mask)
            self._append_turn(key, value, mask)
        elif isinstance(self.recipe.decode, FixedPoint):
            self._write_at_fixed_point(self.recipe.decode, key, value)
        else:
            self.entries.append(key, value, self.seen)
        self.seen += count
        if count > 1:
            self._fix()
        return self.entries.attend(query, mask, scaling)

    def _append_turn(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Append the entries of a new turn as they are; the allowance grows by as many."""
        assert self.entries is not None
        before = self.entries.held
        # The last new token sees every new token but padding.
        self.entries.append(key, value, self.seen, None if mask is None else mask[:, 0, -1])
        added = [held - old for held, old in zip(self.entries.held, before, strict=True)]
        self.turn_tokens = [tokens + new for tokens, new in zip(self.turn_tokens, added, strict=True)]
        self.padding = [tokens + key.shape[2] - new for tokens, new in zip(self.padding, added, strict=True)]

    def _fix(self) -> None:
        """Let the fixed point of the decode rule follow what is held now."""
        assert self.entries is not None
        if isinstance(self.recipe.decode, FixedPoint):
            self.fixed_indices = [self.recipe.decode.fixed_index(held) for held in self.entries.held]
            self.fixed_positions = self.entries.positions_at(self.fixed_indices, next_position=self.seen)

    def _write_at_fixed_point(self, rule: FixedPoint, key: Tensor, value: Tensor) -> None:
        """Write one new entry a sequence to a vacant slot, or over the entry that the rule drops."""
        assert self.entries is not None
        entries = self.entries
        drops = []
        for row, (share, padding, turn) in enumerate(zip(self.shares, self.padding, self.turn_tokens, strict=True)):
            allowance = share * (self.seen + 1 - padding - turn) + turn
            drops.append(rule.drops(entries.held[row], allowance, self.fixed_indices[row]))
        entries.reserve(1)
        # More than one entry goes only where the number kept after prefill was rounded up.
        while max(drops) > 1:
            entries.vacate(self._slots([drop < 2 for drop in drops]), [drop > 1 for drop in drops])
            drops = [drop - (drop > 1) for drop in drops]
        grow = [drop == 0 for drop in drops]
        entries.overwrite(key, value, self.seen, self._slots(grow), grow)

    def _slots(self, grow: list[bool]) -> Tensor:
        """Slot of each sequence and KV head that is vacant, where ``grow``, or is dropped next, ``[B, H_kv]``."""
        assert self.entries is not None and self.fixed_positions is not None
        positions = self.entries.positions
        return slot_to_write(positions, self.fixed_positions, torch.tensor(grow, device=positions.device))

    # What generation strategies ask of a cache

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether new entries can be taken back: a fixed point overwrites old ones, which are lost."""
        return not isinstance(self.recipe.decode, FixedPoint)

    def activate_past_recording(self) -> None:
        """Refuse assisted generation where it could not take candidates back."""
        if not self.is_croppable:
            self._refuse_crop()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back ``-tokens_to_remove`` tokens that were added since compression.

        Raises:
            ValueError: the tokens belong to the compressed prompt, or the decode rule overwrites entries.
        """
        count = abs(tokens_to_remove)
        if count == 0:
            return
        if not self.is_croppable:
            self._refuse_crop()
        added = self.seen - self.prompt.length
        if self.entries is None or count > added:
            raise ValueError(
                f"Cannot crop {count} tokens: only {max(added, 0)} were added since the prompt was compressed."
            )
        self.entries.drop_newest(count)
        self.seen -= count

    def _refuse_crop(self) -> NoReturn:
        raise ValueError(
            f"The decode rule {self.recipe.decode.kind!r} overwrites entries, so tokens cannot be taken back: "
            "assisted generation and crop need a recipe whose decode rule is 'grow'."
        )

    def select_rows(self, rows: list[int], index: Tensor) -> None:
        """Replace the sequences by those at ``rows`` (the same numbers as a list and as a tensor)."""
        self.spans = [self.spans[row] for row in rows]
        if self.entries is None:
            return
        self.entries.select_rows(rows, index)
        self.kept = [self.kept[row] for row in rows]
        self.shares = [self.shares[row] for row in rows]
        self.padding = [self.padding[row] for row in rows]
        self.turn_tokens = [self.turn_tokens[row] for row in rows]
        if self.fixed_positions is not None:
            self.fixed_indices = [self.fixed_indices[row] for row in rows]
            self.fixed_positions = self.fixed_positions.index_select(0, index.to(self.fixed_positions.device))

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that transformers builds: after compression it is about the new tokens only."""
        if self.entries is None:
            return self.seen + query_length, 0
        return query_length, self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage is made when the prompt has been seen."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand new entries through: the attention function brings them back together with their queries."""
        return key_states, value_states

    def reset(self) -> None:
        """Forget everything and wait for the same prompt again."""
        self.start(self.prompt)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer's keys, values and positions occupy."""
        if self.entries is not None:
            return self.entries.nbytes
        return sum(states.nbytes for states in (self.keys, self.values) if states is not None)

    @property
    def held(self) -> list[int]:
        """Entries that each sequence holds now, in every KV head."""
        return self.entries.held if self.entries else []

    def per_head(self, counts: list[int]) -> list[list[int]]:
        """Counts of each sequence, for every one of its KV heads."""
        heads = self.entries.keys.shape[1] if self.entries else 0
        return [[count] * heads for count in counts]

    @property
    def full_bytes(self) -> int:
        """Bytes that the full cache's keys and values would occupy for the tokens seen."""
        keys, values = (self.entries.keys, self.entries.values) if self.entries else (self.keys, self.values)
        return sum(states[:, :, 0].nbytes * self.seen for states in (keys, values) if states is not None)


def _recent_mask(attention_mask: Any) -> Tensor | None:
    """What new tokens see of each other, bool ``[B, 1, q, q]`` or None for causal, from transformers' mask for them."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        # Flash attention is given the padding only.
        count = attention_mask.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=attention_mask.device).tril()
        return causal & attention_mask.bool()[:, None, None]
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask == 0
