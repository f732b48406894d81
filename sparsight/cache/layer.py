"""One layer of the cache, as transformers sees it: first the whole prompt, then the entries that stay."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsight.attention.function import is_plain, own_attention, visible
from sparsight.cache.bounded_prefill import BoundedPrefill, check_cuts
from sparsight.cache.eviction_state import HeavyHitters, Ring
from sparsight.cache.prefill import Prefill
from sparsight.cache.ragged_store import KVStore
from sparsight.cache.static_store import StaticStore
from sparsight.compression import Grow, HeavyHitter
from sparsight.compression.layer_statistics import KeepRatio
from sparsight.compression.recipe import Recipe
from sparsight.models.prompt import Prompt


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Attributes:
        first: the first layer of the cache, None if this is it.
        seen: tokens seen, padding included; positions follow it.
        prefill: the prompt so far, until it is compacted.
        entries: what is held from then on.
        fixed: the same with addresses that stay, if there is room for a known number of tokens.
        kept: how many prompt entries each row of the entries kept.
        exact: whether every token of the prompt saw all of those before it.
        cut_short: whether the prefill's bound left fewer entries than were planned.
    """

    is_sliding = False

    def __init__(
        self,
        recipe: Recipe,
        prompt: Prompt,
        room: int | None,
        bound: float | None,
        first: "CompressedLayer | None",
    ) -> None:
        super().__init__()
        self.recipe, self.room, self.bound, self.first = recipe, room, bound, first
        self.start(prompt)

    @classmethod
    def join(
        cls,
        layers: Sequence["CompressedLayer"],
        prompt: Prompt,
        padding: Sequence[int],
        first: "CompressedLayer | None",
    ) -> "CompressedLayer":
        """The sequences of several layers that hold their compressed prompts and nothing more.

        ``prompt`` is all of theirs, with ``padding[i]`` more tokens in front of those of ``layers[i]``.
        """
        joined = cls(layers[0].recipe, prompt, layers[0].room, layers[0].bound, first)
        joined.exact = all(layer.exact for layer in layers)
        joined.cut_short = any(layer.cut_short for layer in layers)
        joined.seen, joined.is_initialized = prompt.length, True
        parts: list[Any] = [layer.entries for layer in layers]
        joined.entries = type(parts[0]).join(parts, padding)
        joined.kept = [count for layer in layers for count in layer.kept]
        if layers[0].ring is not None:
            rings = [layer.ring for layer in layers]
            joined.ring = type(layers[0].ring).join(rings, parts, padding, joined.entries, prompt.length)
        joined._fix()
        return joined

    def start(self, prompt: Prompt) -> None:
        """Forget everything and wait for ``prompt``."""
        self.prompt = prompt
        self.seen = 0
        self.prefill: Prefill | None = None
        self.entries: KVStore | None = None
        self.fixed: StaticStore | None = None
        self.kept: list[int] = []
        self.ring: Ring | HeavyHitters | None = None
        self.record_past = False
        self.exact, self.cut_short = True, False
        # Some models ask whether their prompt's prefix has been seen.
        self.is_initialized = False

    def attend_prompt(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        causal: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model's own attention over the prompt so far, and observe the queries that matter.

        ``causal`` tells that they see all keys up to their own but padding. Where all of them matter, one pass of
        our own gives their attention too, on a CPU.
        """
        if self.bound is not None and query.shape[2] < self.prompt.length:
            check_cuts(self.recipe, causal=causal)
        self.seen, self.is_initialized = self.seen + query.shape[2], True
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        prefill = self.prefill
        if isinstance(prefill, BoundedPrefill) and prefill.rows is not None:
            return prefill.attend_cut(query, key, value, scaling), None
        if prefill is None:
            first = self.recipe, self.prompt, key, value
            self.prefill = prefill = Prefill(*first) if self.bound is None else BoundedPrefill(*first, self.bound)
        else:
            prefill.extend(key, value)
            key, value = prefill.keys, prefill.values
        output: tuple[Tensor, Tensor | None]
        if causal and prefill.needs_every_query and is_plain(module, query, key, value, **kwargs):
            output = prefill.attend(query, scaling), None
        else:
            output = own_attention(module, query, key, value, attention_mask, **kwargs)
            prefill.observe(query, scaling, None if causal else visible(attention_mask))
        if isinstance(prefill, BoundedPrefill):
            prefill.cut(query, scaling)
        return output

    def compact(self, shares: Sequence[KeepRatio]) -> None:
        """Keep ``shares[b]`` of each sequence's prompt, and free the rest."""
        assert self.prefill is not None
        prefill, self.prefill = self.prefill, None
        self.entries = prefill.compact(shares)
        self.exact, self.cut_short = prefill.exact, prefill.cut_short
        beyond = self.seen - self.prompt.length
        self.kept = [held - beyond for held in self.entries.held]
        rule = self.recipe.decode
        if not isinstance(rule, Grow):
            by_row = [row for share in shares for row in (share if isinstance(share, list) else [share])]
            padding = [self.prompt.length - span.length for span in self.prompt.spans]
            padding = [tokens for tokens in padding for _ in range(len(by_row) // len(padding))]
            kind = HeavyHitters if isinstance(rule, HeavyHitter) else Ring
            self.ring = kind(rule, by_row, padding)
            self.ring.start(self.entries, prefill, self.seen)
        self._fix()

    def _fix(self) -> None:
        """Make room for the tokens to come, if their number is known, where addresses stay."""
        if self.room is not None and self.entries is not None:
            first = None if self.first is None else self.first.fixed
            self.fixed = StaticStore(self.entries, self.ring, self.seen, self.room, first)

    def settle(self) -> None:
        """Take note of the tokens that were taken in where addresses stay."""
        if self.fixed is not None:
            self.seen = self.fixed.settle()

    def attend_held(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None
    ) -> Tensor:
        """Take in the new entries and attend over all entries held, ``[B, H, q, D]``."""
        assert self.entries is not None
        key, value = key.detach(), value.detach()
        count = key.shape[2]
        if self.fixed is not None and count == 1:
            self.fixed.take_in(key, value)
            return self.fixed.attend(query, scaling)
        self.settle()
        position, self.seen = self.seen, self.seen + count
        # A single token sees everything; of a new turn, the last token sees every other but padding.
        mask = _recent_mask(attention_mask) if count > 1 else None
        if count == 1 and self.ring is not None:
            self.ring.write(self.entries, key, value, position)
        else:
            before = self.entries.held
            self.entries.append(key, value, position, None if mask is None else mask[:, 0, -1])
            if self.ring is not None:
                self.ring.add_turn(self.entries, before, count, self.seen)
        if self.ring is None:
            output = self.entries.attend(query, mask, scaling)
        else:
            output = self.ring.attend(self.entries, query, mask, scaling)
        self._fix()
        return output

    # What generation strategies ask of a cache

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # a plain attribute there
        """Whether new entries can be taken back: rules that drop overwrite old ones, which are lost."""
        return isinstance(self.recipe.decode, Grow)

    def activate_past_recording(self) -> None:
        """Expect candidates that may be taken back; refused where they could not be."""
        if not self.is_croppable:
            self._refuse_crop()
        if self.bound is not None:
            raise ValueError(
                "Assisted generation brings its first candidates together with the prompt, which a bounded prefill "
                "cannot take: leave prefill_bound out."
            )
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back ``-tokens_to_remove`` tokens that were added since compression.

        Raises:
            ValueError: the tokens belong to the compressed prompt, or the decode rule overwrites entries.
        """
        count = -tokens_to_remove
        if count == 0:
            return
        if count < 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}.")
        if not self.is_croppable:
            self._refuse_crop()
        self.settle()
        added = self.seen - self.prompt.length
        if self.entries is None or count > added:
            raise ValueError(
                f"Cannot crop {count} tokens: only {max(added, 0)} were added since the prompt was compressed."
            )
        self.entries.drop_newest(count)
        self.seen -= count
        self._fix()

    def _refuse_crop(self) -> NoReturn:
        raise ValueError(
            f"The decode rule {self.recipe.decode.kind!r} overwrites entries, so tokens cannot be taken back: "
            "assisted generation and crop need a recipe whose decode rule is 'grow'."
        )

    def select_rows(self, prompt: Prompt, index: Tensor) -> None:
        """Replace the sequences by those at ``index``, a tensor on the CPU, whose prompts are ``prompt``.

        Raises:
            ValueError: the prompt has been seen in part only.
        """
        if self.prefill is not None:
            raise ValueError("The sequences of a cache cannot be reordered before it has seen the whole prompt.")
        self.prompt = prompt
        self.settle()
        if self.entries is not None:
            rows = self.entries.rows_of(index)
            self.entries.select_rows(rows)
            self.kept = [self.kept[row] for row in rows.tolist()]
            if self.ring is not None:
                self.ring.select_rows(rows)
            self._fix()

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # a plain attribute there
        """Whether decoding one token can be recorded and replayed: addresses stay."""
        return self.room is not None

    def get_seq_length(self) -> Any:
        """Tokens seen, as a tensor where addresses stay, so that it may be recorded."""
        return self.seen if self.fixed is None else self.fixed.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that transformers builds: once entries went it is about the new tokens only."""
        if self.entries is None:
            cut = isinstance(self.prefill, BoundedPrefill) and self.prefill.rows is not None
            return (query_length, self.seen) if cut else (self.seen + query_length, 0)
        if self.fixed is not None and torch.compiler.is_compiling():
            # The mask of a single token is not looked at, and may not hang on a number that changes.
            return query_length, 0
        return query_length, int(self.get_seq_length())

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

    # What the layer holds

    @property
    def nbytes(self) -> int:
        """Bytes that the layer's tensors occupy."""
        if self.entries is not None:
            return self.entries.nbytes
        return 0 if self.prefill is None else self.prefill.nbytes

    @property
    def full_bytes(self) -> int:
        """Bytes that the full cache's keys and values would occupy for the tokens seen."""
        states = self.entries or self.prefill
        return 0 if states is None else self.seen * states.token_bytes


def _recent_mask(attention_mask: Any) -> Tensor | None:
    """What new tokens see of each other, bool ``[B, 1, q, q]`` or None for causal, from transformers' mask for them."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        # Flash attention is given the padding only.
        count = attention_mask.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=attention_mask.device).tril()
        return causal & visible(attention_mask)[:, None, None]
    return visible(attention_mask)
