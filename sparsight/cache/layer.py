"""One layer of the cache, as transformers sees it: first the prompt, then the entries that stay."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsight.attention.interface import is_plain, own_attention, visible
from sparsight.attention.rope import Rotation
from sparsight.cache.bounded_prefill import BoundedPrefill, check_cuts
from sparsight.cache.compaction import begin_eviction, compact
from sparsight.cache.host_copy import HostCopy
from sparsight.cache.kv_store import KVStore
from sparsight.cache.prefill import Prefill
from sparsight.cache.prompt_recall import FullStates, PromptRecall, begin_recall
from sparsight.cache.step_metadata import StepMetadata
from sparsight.compression.allocate import KeepRatio
from sparsight.compression.eviction import EvictionState, fitted
from sparsight.compression.recipe import Recipe
from sparsight.models.prompt import Prompt


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Attributes:
        first: the first layer of the cache, None if this is it.
        seen: tokens seen, padding included; positions follow it. With static storage :meth:`sync_lengths` updates it.
        prefill: the prompt so far, until it is compacted.
        resumed: copies of the prompts' first tokens, and which of their layers this is, until the prefill begins.
        earlier: in the first layer of a bounded prefill, what the scores of the layers so far have left for later ones.
        store: the entries held from then on.
        eviction: which of them may go.
        step: where the sequences are, shared with the other layers of the device.
        kept: how many prompt entries each row of the store kept.
        exact: whether every token of the prompt attended to all of those before it.
        cut_short: whether the prefill's bound left fewer entries than were planned.
        recalls: for each sequence, what fetches entries of its prompt back, if the decode rule does.
    """

    is_sliding = False

    def __init__(
        self,
        recipe: Recipe,
        prompt: Prompt,
        capacity: int | None,
        bound: float | None,
        first: "CompressedLayer | None",
    ) -> None:
        super().__init__()
        self.recipe, self.capacity, self.bound, self.first = recipe, capacity, bound, first
        self.start(prompt)

    def start(self, prompt: Prompt) -> None:
        """Forget everything and wait for ``prompt``."""
        self.prompt = prompt
        self.seen = 0
        self.prefill: Prefill | None = None
        self.resumed: tuple[Sequence[HostCopy], int] | None = None
        self.earlier: list[list[Tensor]] = [[] for _ in prompt.spans]
        self.store: KVStore | None = None
        self.eviction: EvictionState | None = None
        self.step: StepMetadata | None = None
        self.kept: list[int] = []
        self.record_past = False
        self.exact, self.cut_short = True, False
        self.recalls: list[PromptRecall] = []
        # Some models ask whether their prompt's prefix has been seen.
        self.is_initialized = False

    def resume(self, copies: Sequence[HostCopy], layer: int, seen: int) -> None:
        """Begin the prefill with ``seen`` tokens, padding included, that were processed before.

        ``copies`` have at least those of each sequence.
        """
        self.resumed, self.seen, self.is_initialized = (copies, layer), seen, True

    def _resumed(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H_kv, n, D]`` of the tokens that were processed before, and of the new ones."""
        if self.resumed is None:
            return key, value
        (copies, layer), self.resumed = self.resumed, None
        before = self.seen - key.shape[2]
        joined = [new.new_zeros(*new.shape[:2], self.seen, new.shape[3]) for new in (key, value)]
        for full, new in zip(joined, (key, value), strict=True):
            full[:, :, before:] = new
        for sequence, (copied, span) in enumerate(zip(copies, self.prompt.spans, strict=True)):
            for full, states in zip(joined, copied.states(layer, 0, max(before - span.start, 0)), strict=True):
                full[sequence, :, before - states.shape[1] : before].copy_(states, non_blocking=True)
        return joined[0], joined[1]

    def attend_prompt(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        causal: bool,
        rotation: Rotation | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model's own attention over the prompt so far, and observe the queries that matter.

        ``causal`` says that they attend to all keys up to their own except padding. Where all of them matter, one pass
        of our own computes their attention too, on a CPU. ``rotation`` is for scores of queries before RoPE.
        """
        if self.bound is not None and query.shape[2] < self.prompt.length:
            check_cuts(self.recipe, causal=causal)
        self.seen, self.is_initialized = self.seen + query.shape[2], True
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        prefill = self.prefill
        if isinstance(prefill, BoundedPrefill) and prefill.remaining is not None:
            return prefill.attend_cut(query, key, value, scaling), None
        if prefill is None:
            key, value = self._resumed(key, value)
            first = self.recipe, self.prompt, key, value
            earlier = (self.first or self).earlier
            self.prefill = prefill = (
                Prefill(*first) if self.bound is None else BoundedPrefill(*first, self.bound, earlier)
            )
        else:
            prefill.extend(key, value)
            key, value = prefill.keys, prefill.values
        prefill.rotation = rotation
        output: tuple[Tensor, Tensor | None]
        if causal and prefill.needs_every_query and is_plain(module, query, key, value, **kwargs):
            output = prefill.attend(query, scaling), None
        else:
            output = own_attention(module, query, key, value, attention_mask, **kwargs)
            prefill.observe(query, scaling, None if causal else visible(attention_mask))
        if isinstance(prefill, BoundedPrefill):
            prefill.cut(query, scaling)
        return output

    def full_states(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, T, D]`` of the valid tokens of a complete prompt, before it is compacted."""
        assert self.prefill is not None
        return self.prefill.entries(sequence)[:2]

    def compact(self, ratios: Sequence[KeepRatio], full: Sequence[FullStates] = ()) -> None:
        """Keep ``ratios[b]`` of each sequence's prompt, and free the rest; ``full`` is for decode rules that recall."""
        assert self.prefill is not None
        prefill, self.prefill, self.earlier = self.prefill, None, []
        self.store, self.kept, self.cut_short = compact(prefill, ratios)
        self.exact = prefill.exact
        self.eviction = begin_eviction(prefill, ratios, self.store)
        self.recalls = begin_recall(prefill, self.store.by_head(self.kept), full) if self.recipe.decode.recalls else []
        self._begin_decoding()

    def _begin_decoding(self) -> None:
        """Prepare for single tokens: positions, and with a known capacity storage that stays where it is."""
        store, state = self._decoding()
        device, first = store.held.device, self.first
        # A layer on another device has metadata of its own.
        step = None if first is None else first.step
        self.leads = step is None or step.position.device != device
        if step is None or self.leads:
            batch = len(self.prompt.spans)
            step = StepMetadata(self.recipe.decode, batch, store.heads, self.seen, self.capacity, device)
        self.step, self._index = step, step.add_layer(store, state)
        if self.capacity is None:
            return
        store.static = False
        step.make_room(self._index, self.seen, self.recipe.decode.growth(store, state, self.seen, self.capacity))
        store.static = True
        if device.type == "cuda":
            # Otherwise torch.compile would copy the entries for every token.
            for tensor in (*store.tensors, *state.tensors):
                torch._dynamo.mark_static_address(tensor)

    def drop_excess(self) -> None:
        """Drop what rounding kept beyond the allowance, before the first token."""
        self._step().make_room(self._index, self.seen, 0)

    def prepare_step(self) -> None:
        """Have the step metadata complete before a step is captured or compiled."""
        step = self._step()
        step.gather()
        if step.position.device.type == "cuda":
            # Otherwise torch.compile would copy the entries for every token.
            for tensor in step.tensors:
                torch._dynamo.mark_static_address(tensor)

    def sync_lengths(self) -> None:
        """Count the tokens that were seen with static storage, whose steps do not run this code."""
        if self.step is not None and self.capacity is not None:
            self.seen = int(self.step.seen)

    def attend_held(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None
    ) -> Tensor:
        """Write the new entries and attend over all entries held, ``[B, H, q, D]``."""
        mask = None
        if torch.is_grad_enabled():
            key, value = key.detach(), value.detach()
        if key.shape[2] == 1:
            self._write(key, value)
        else:
            # Of a new turn, the last token attends to every other except padding.
            mask = _recent_mask(attention_mask)
            self._append(key, value, None if mask is None else mask[:, 0, -1])
        self._recall(query, scaling)
        store, state = self._decoding()
        if self.recipe.decode.tracks_attention:
            output, received = store.attend_and_score(query, mask, scaling)
            self.recipe.decode.record(state.scores, received.detach())
        else:
            output = store.attend(query, mask, scaling)
        return output

    def _write(self, key: Tensor, value: Tensor) -> None:
        """Write the entries of one new token of every sequence."""
        (store, state), step = self._decoding(), self._step()
        if self.leads:
            if not store.static:
                step.make_room_everywhere(self.seen)
            step.advance()
        if not store.static:
            self.seen += 1
        store.write(key, value, step.row_positions, step.places[self._index])
        if self.recipe.decode.tracks_attention:
            # What took the place of an entry does not inherit its score.
            state.scores.scatter_(1, step.slots[self._index][:, None], 0)

    def _recall(self, query: Tensor, scaling: float | None) -> None:
        """Let the decode rule fetch entries of the prompts for the newest tokens, queries ``[B, H, q, D]``."""
        store, _ = self._decoding()
        for sequence, recall in enumerate(self.recalls):
            # The end of a new turn asks for something else.
            if query.shape[2] > 1 or recall.is_due(self.seen - 1):
                recall.fetch(query[sequence, :, -1], scaling, store.flat(), store.starts[store.rows_of(sequence)])

    def _append(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """Append the entries of a new turn, bool ``valid`` ``[B, q]`` excludes padding."""
        self.sync_lengths()
        store, state = self._decoding()
        count, before = key.shape[2], store.held
        store.append(key, value, self.seen, valid)
        self.seen += count
        added = store.held - before
        state.turn_tokens = state.turn_tokens + added
        state.excluded = state.excluded + count
        self.recipe.decode.protect(store, state, self.seen)
        state.rounded, state.scores = True, fitted(state.scores, max(store.capacities))
        self._begin_decoding()

    def _decoding(self) -> tuple[KVStore, EvictionState]:
        """What decoding works on."""
        assert self.store is not None and self.eviction is not None
        return self.store, self.eviction

    def _step(self) -> StepMetadata:
        assert self.step is not None
        return self.step

    # What generation strategies ask of a cache

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # a plain attribute there
        """Whether new entries can be taken back: rules that drop overwrite old ones, which are lost."""
        return self.recipe.decode.croppable

    def activate_past_recording(self) -> None:
        """Prepare for candidate tokens that may be cropped; refused where the decode rule cannot crop."""
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
        self.sync_lengths()
        added = self.seen - self.prompt.length
        if self.store is None or count > added:
            raise ValueError(
                f"Cannot crop {count} tokens: only {max(added, 0)} were added since the prompt was compressed."
            )
        self.seen -= count
        self.store.crop(self.seen)
        self._begin_decoding()

    def _refuse_crop(self) -> NoReturn:
        raise ValueError(
            f"The decode rule {self.recipe.decode.kind!r} overwrites entries, so tokens cannot be taken back: "
            "assisted generation and crop need a recipe whose decode rule is 'grow'."
        )

    def select(self, prompt: Prompt, index: Tensor) -> None:
        """Replace the sequences by those at ``index``, a tensor on the CPU, whose prompts are ``prompt``.

        Raises:
            ValueError: the prompt has been seen in part only.
        """
        if self.prefill is not None:
            raise ValueError("The sequences of a cache cannot be reordered before the prompt is complete.")
        self.prompt = prompt
        self.sync_lengths()
        if self.store is not None and self.eviction is not None:
            rows = self.store.row_index(index)
            self.store.select(index)
            self.kept = [self.kept[row] for row in rows.tolist()]
            self.eviction = self.eviction.select(rows.to(self.store.held.device))
            self.recalls = [self.recalls[sequence] for sequence in index.tolist() if self.recalls]
            self._begin_decoding()

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # a plain attribute there
        """Whether a decode step can be captured or compiled: storage is static."""
        return self.capacity is not None

    def get_seq_length(self) -> Any:
        """Tokens seen, as a tensor where storage is static, so that it can be captured."""
        return self.seen if self.step is None or self.capacity is None else self.step.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that transformers builds: once entries went it is about the new tokens only."""
        if self.store is None:
            cut = isinstance(self.prefill, BoundedPrefill) and self.prefill.remaining is not None
            return (query_length, self.seen) if cut else (self.seen + query_length, 0)
        if self.capacity is not None and torch.compiler.is_compiling():
            # The mask of a single token is ignored, and may not depend on a number that changes.
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
        if self.store is not None:
            return self.store.nbytes + sum(recall.nbytes for recall in self.recalls)
        return 0 if self.prefill is None else self.prefill.nbytes

    @property
    def entry_bytes(self) -> int:
        """Bytes of the keys and values of the entries held."""
        if self.store is not None:
            return int(self.store.held.sum()) * self.store.token_bytes // len(self.store.held)
        return 0 if self.prefill is None else self.prefill.nbytes

    @property
    def full_bytes(self) -> int:
        """Bytes that the full cache's keys and values would occupy for the tokens seen."""
        states = self.store or self.prefill
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
