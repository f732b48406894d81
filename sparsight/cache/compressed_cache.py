"""CompressedCache: the one object that a user hands to ``model.generate``."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparsight.attention.interface import is_causal, mark, override_attention, visible
from sparsight.attention.rope import Rope, Rotation, newest_valid, rotary_positions
from sparsight.cache.bounded_prefill import check_bound
from sparsight.cache.host_copy import DTYPES, HostCopy
from sparsight.cache.kv_store import KVStore
from sparsight.cache.language_hook import hook_language
from sparsight.cache.language_inputs import LanguageInputs
from sparsight.cache.layer import CompressedLayer
from sparsight.cache.plan import make_plan
from sparsight.cache.prefill import Prefill, first_query
from sparsight.cache.replay import replay
from sparsight.cache.report import Report
from sparsight.cache.transcript import Transcript
from sparsight.compression import Reconstruction, VisualHeads
from sparsight.compression.recipe import Recipe, check_recipe
from sparsight.methods import with_instructions, with_shipped_scores
from sparsight.models.families import family_of
from sparsight.models.prompt import Prompt, locate
from sparsight.utils import checks

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that change the weights in ways the statistics do not know."""

LINEAR_STATES = ("conv_states", "recurrent_states")
"""States of transformers' linear attention layers."""


class CompressedCache(Cache):
    """A KV cache that keeps a budget of the prompt's entries.

    It gathers statistics during the prefill, plans what every layer keeps, compacts, and decodes over what it kept::

        cache = CompressedCache(model, VLCache(budget=0.1), inputs)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        print(cache.report())

    A second ``generate`` with the same cache and more tokens continues the conversation: the entries of the new turn
    are added uncompressed, or with ``keep="host"`` the conversation is compressed again. Layers with a sliding window
    or linear attention are bounded already and are left unchanged.

    Args:
        model: an unmodified transformers model. While the cache lives, attention of its language part goes through
            Sparsight, which forwards every call except this cache's own to the model's attention.
        recipe: the method and its numbers.
        inputs: the processor's output for the prompts, as it will be given to ``generate``.
        max_new_tokens: allocate static storage for this many tokens after the prompt, and after each new turn. Then
            ``generate`` compiles decoding on a GPU, as with transformers' own static cache; use
            :func:`sparsight.generate` for prompts in chunks. An answer that is continued without a new turn counts from
            its beginning. If None, or with a decode rule that recalls, storage grows as needed.
        prefill_bound: bound peak memory by cutting each layer to this multiple of the budget as soon as it has seen the
            prompt. The result is the same except in layers for which more was planned. A prompt in chunks
            (``prefill_chunk_size``) is cut after each chunk, which is approximate. The report says where either
            happened.
        keep: ``"host"`` keeps the full keys and values of the prompt in host memory. Two tokens or more after an answer
            are then a new turn: they attend to the full cache, and what is held afterwards is what compressing the
            whole conversation as one prompt would have kept. A recipe whose decode rule recalls
            always has the prompt there.
        host_dtype: ``"int8"`` stores what is kept in host memory in 8 bits, one scale per token and head, in about half
            the bytes of bfloat16. A new turn then attends to rounded keys and values. None stores them as they are.

    Attributes:
        copies_prompt: whether the full keys and values of the prompt are kept in host memory.
        host: in that case a :class:`~sparsight.cache.host_copy.HostCopy` of each sequence, once the prompt is complete;
            otherwise empty.

    Raises:
        ValueError: the model has no language part or none of its layers can be compressed, the inputs are not a batch
            of prompts (see :func:`sparsight.models.prompt.locate`), ``max_new_tokens`` is not a positive
            number, the bound is no number of at least 1, the recipe merges or repeats the prompt and there is a
            bound, or ``keep`` does not go with the model or the other arguments.
    """

    # The language part, for recipes that need it, until the prompt is compressed: a copied cache must not copy it.
    _language: Any = None

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        inputs: Mapping[str, Any],
        max_new_tokens: int | None = None,
        prefill_bound: float | None = None,
        keep: str | None = None,
        host_dtype: str | None = None,
    ) -> None:
        if host_dtype is not None:
            checks.one_of("host_dtype", host_dtype, DTYPES)
        if max_new_tokens is not None:
            checks.count("max_new_tokens", max_new_tokens, least=1)
        check_recipe(recipe)
        if prefill_bound is not None:
            check_bound(prefill_bound, recipe)
        language = language_part(model)
        name = str(model.name_or_path)
        self.recipe = recipe = with_instructions(with_shipped_scores(recipe, name), name)
        grids = any(isinstance(getattr(part, "pool", 1), tuple) for part in (recipe.score, recipe.decode))
        find = {"grids": grids, "frames": recipe.score.needs_frames}
        prompt = locate(model.config, inputs, **find)
        layers = DynamicCache(config=language.config).layers
        first: CompressedLayer | None = None
        # Steps that read the host cannot be captured or compiled.
        capacity = None if recipe.decode.recalls else max_new_tokens
        for index in compressible(language.config):
            layer = CompressedLayer(recipe, prompt, capacity, prefill_bound, first)
            layers[index], first = layer, first or layer
        super().__init__(layers=layers)
        self.compressed = [layer for layer in layers if isinstance(layer, CompressedLayer)]
        self._model_name = type(model).__name__
        if not self.compressed:
            raise ValueError(f"{type(model).__name__} has no layer to compress: none of them is plain full attention.")
        if isinstance(recipe.allocate, VisualHeads):
            recipe.allocate.check_model(len(self.compressed), language.config.num_key_value_heads)
        if keep is not None:
            checks.one_of("keep", keep, ("host",))
            check_keep(model)
            for name, value in {"max_new_tokens": max_new_tokens, "prefill_bound": prefill_bound}.items():
                if value is not None:
                    raise ValueError(f"keep='host' does not go with {name}: leave one of them out.")
        self.copies_prompt, self._host_dtype = keep is not None or recipe.decode.recalls, host_dtype
        self._transcript = None if keep is None else Transcript(model.config, find)
        self._attention_override = override_attention(language.config)
        hooked = self.needs_tokens or keep is not None
        self._language_hook = hook_language(model, language) if hooked else None
        self._located = prompt
        self._start(prompt)

    @property
    def needs_tokens(self) -> bool:
        """Whether the recipe needs more of the prompt's tokens than the attention layers are given."""
        return self.recipe.score.before_rope or self.repeats_prompt

    @property
    def repeats_prompt(self) -> bool:
        """Whether the language part processes the prompt a second time."""
        return self.recipe.score.needs_replay

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        """Called before each forward pass of the model."""
        if self._transcript is not None:
            self._transcript.call = {name: each for name, each in arguments.items() if each is not self}

    def begin_forward(self, language: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """Called before each forward pass of the language part: note its arguments.

        Returns:
            Other arguments, if the new tokens are those of a turn that begins with tokens that were seen before.
        """
        changed = None if self._transcript is None else self._note(self._transcript, language, arguments)
        if self.needs_tokens and self.compressed[0].store is None:
            self._language = language
            self._arguments = {name: each for name, each in (changed or arguments).items() if each is not self}
        return changed

    def _note(
        self, transcript: Transcript, language: PreTrainedModel, arguments: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Add the new tokens to the transcript; other arguments, where they begin a new turn."""
        first = self.compressed[0]
        tokens = next(arguments[name] for name in ("inputs_embeds", "input_ids") if arguments.get(name) is not None)
        count = tokens.shape[1]
        positions = rotary_positions(arguments.get("position_ids"), first.seen, count, tokens.device)
        transcript.add(LanguageInputs.of(language, arguments, positions), first.seen)
        if first.store is None or count == 1:
            return None
        prompt = transcript.continued(self.prompt, count, arguments.get("attention_mask"))
        copies = self.host
        self._start(prompt)
        self.resume(copies)
        mask = prompt.valid_mask.to(tokens.device)
        return {
            **{name: each for name, each in arguments.items() if name != "input_ids"},
            **transcript.arguments(first.seen, tokens.device),
            "attention_mask": mask,
        }

    def resume(self, copies: Sequence[HostCopy]) -> int:
        """Begin the prefill with tokens that were processed before.

        Args:
            copies: keys and values of the first tokens of each prompt.

        Returns:
            How many tokens, padding included, are not to be processed again: at most those before the first one whose
            query the recipe looks at.
        """
        starts = [
            min(span.start + copied.tokens, first_query(self.recipe, self.prompt, sequence))
            for sequence, (span, copied) in enumerate(zip(self.prompt.spans, copies, strict=True))
        ]
        # A single token would be taken for the answer's.
        start = max(min(*starts, self.prompt.length - 2), 0)
        for index, layer in enumerate(self.compressed):
            layer.resume(copies, index, start)
        return start

    def end_forward(self, output: Any) -> None:
        """Called after each forward pass of the language part: repeat the prompt, if it is complete and must be."""
        if self._transcript is not None:
            self._transcript.restrict(output)
        score, inputs = self.recipe.score, self._inputs
        if isinstance(score, Reconstruction) and inputs is not None and self.compressed[-1].seen >= self.prompt.length:
            prefills = {index: prefill for index, layer in enumerate(self.layers) if (prefill := _prefill_of(layer))}
            replay(inputs, self.layers, prefills, self.prompt, score)
            self._compact()

    def _start(self, prompt: Prompt) -> None:
        """Forget everything and wait for ``prompt``."""
        self.prompt = prompt
        self.host: list[HostCopy] = []
        self._unattended = False
        self._causal = True
        self._sparsity: list[list[float]] | None = None
        self._rope: Rope | None = None
        self._inputs: LanguageInputs | None = None
        for layer in self.compressed:
            layer.start(prompt)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: keys ``[B, H_kv, q, D]`` go on to the attention function, marked."""
        if layer_idx >= len(self.layers):
            raise self._foreign_model()
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # Every update must come back through the attention function, or it is not this model's.
        if self._unattended:
            self._unattended = False
            raise self._foreign_model()
        if layer.store is None:
            self._check_prompt(layer, *key_states.shape[0::2])
            # Attention and statistics read head by head, and what came out of a fused projection is held apart from it.
            key_states, value_states = key_states.contiguous(), value_states.contiguous()
        elif key_states.shape[0] != len(self.prompt.spans):
            raise ValueError(
                f"The cache holds {len(self.prompt.spans)} sequences, but the model was given {key_states.shape[0]}."
            )
        self._unattended = True
        return mark(key_states, partial(self._attend, layer)), value_states

    def _check_prompt(self, layer: CompressedLayer, batch: int, count: int) -> None:
        """Raise ValueError unless ``count`` tokens of ``batch`` sequences can be (the next part of) the prompt."""
        sequences, length = self.prompt.vision_mask.shape
        if batch % sequences or (layer.seen and batch != sequences):
            raise ValueError(
                f"The cache was made for inputs of {sequences} sequences, but the model was given {batch}."
            )
        seen = layer.seen + count
        # Decoding has begun too early, or the prompt is too long (assisted generation adds its candidates to it).
        if (count == 1 and seen < length) or (seen > length and not layer.record_past):
            given = layer.seen or count if seen < length else seen
            raise ValueError(
                f"The cache was made for inputs of {length} tokens, but the model was given {given}: "
                "make a cache for each prompt, or reset() this one to start over."
            )
        if batch != sequences:
            # Beam search and several return sequences repeat each prompt.
            self._start(self.prompt.select([each for each in range(sequences) for _ in range(batch // sequences)]))

    def _attend(
        self, layer: CompressedLayer, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer, called in place of the model's own."""
        self._unattended = False
        if module.config is not self._attention_override.config:
            raise self._foreign_model()
        for name in UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{self._model_name} attends with {name!r}, which a compressed cache does not support."
                )
        if layer.store is not None:
            output = layer.attend_held(query, key, value, mask, kwargs.get("scaling"))
            if layer is self.compressed[-1] and query.shape[2] > 1:
                self._gather()
            return output.transpose(1, 2).contiguous(), None
        if layer is self.compressed[0]:
            seen, first = layer.seen + query.shape[2], layer.get_mask_sizes(query.shape[2])[1]
            self._check_padding(mask, first, seen)
            self._causal = is_causal(mask, self.prompt.valid_mask[:, first:])
            if self.needs_tokens:
                self._note_tokens(layer.seen, query.shape[2], query.device)
        rotation = self._rotation(module)
        result = layer.attend_prompt(module, query, key, value, mask, causal=self._causal, rotation=rotation, **kwargs)
        complete = layer is self.compressed[-1] and layer.seen >= self.prompt.length
        if complete and not self.recipe.score.needs_replay:
            self._compact()
        return result

    def _note_tokens(self, first: int, count: int, device: torch.device) -> None:
        """Note positions and embeddings of the prompt's tokens ``[first, first + count)``."""
        arguments, self._arguments = self._arguments, {}
        positions = rotary_positions(arguments.get("position_ids"), first, count, device)
        self._rope = Rope(self._language, positions, newest_valid(self.prompt.valid_mask, first, count), self._rope)
        if self.repeats_prompt:
            inputs = LanguageInputs.of(self._language, arguments, positions)
            self._inputs = inputs if self._inputs is None else LanguageInputs.joined([self._inputs, inputs])

    def _rotation(self, module: Any) -> Rotation | None:
        """How an attention layer rotates the newest queries, for scores of those before RoPE."""
        return self._rope.of(module) if self._rope is not None and self.recipe.score.before_rope else None

    def _check_padding(self, mask: Any, first: int, seen: int) -> None:
        """Raise ValueError unless transformers' mask for tokens ``[first, seen)`` has the padding of the inputs."""
        length = min(seen, self.prompt.length)
        if mask is None:
            same = all(span.start <= first and span.stop >= length for span in self.prompt.spans)
        else:
            # The last query sees every valid key.
            seen_keys = visible(mask) if mask.ndim == 2 else visible(mask[:, :, -1:])[:, 0, 0]
            seen_keys = seen_keys[:, : length - first].cpu().expand(len(self.prompt.spans), -1)
            same = torch.equal(seen_keys, self.prompt.valid_mask[:, first:length])
        if not same:
            raise ValueError(
                "The prompts given to the model are padded otherwise than the inputs that the cache was made for: "
                "give both the same inputs, attention_mask included."
            )

    def adopt(self, prefills: Sequence[Prefill], inputs: LanguageInputs) -> None:
        """Compact a prompt that was observed elsewhere, one :class:`Prefill` a compressed layer."""
        if self._transcript is not None:
            self._transcript.add(inputs, 0)
        for layer, prefill in zip(self.compressed, prefills, strict=True):
            layer.prefill, layer.seen = prefill, prefill.seen
        self._compact()

    @torch.no_grad()
    def _compact(self) -> None:
        """Plan from all layers' statistics, then compact them one by one, so that memory never peaks again."""
        plan = make_plan([layer.prefill for layer in self.compressed if layer.prefill is not None])
        self._rope = self._inputs = self._language = None
        if self.copies_prompt:
            self.host = [HostCopy(self._host_dtype) for _ in self.prompt.spans]
        for index, (layer, ratios) in enumerate(zip(self.compressed, plan.ratios, strict=True)):
            for sequence, copied in enumerate(self.host):
                copied.add_layer(*layer.full_states(sequence))
            layer.compact(ratios, [partial(copied.states, index) for copied in self.host])
        if self.recipe.allocate.threshold is not None:
            self._sparsity = plan.sparsity
        self._gather()

    def _gather(self) -> None:
        """Prepare the step metadata of static storage now: a captured or compiled step must not."""
        for layer in self.compressed:
            if layer.leads and layer.capacity is not None:
                layer.prepare_step()

    def _foreign_model(self) -> ValueError:
        return ValueError(
            f"This cache was made for a {self._model_name}, and another model or another attention implementation is "
            "using it: make a CompressedCache for each model, after choosing its attention."
        )

    # What generation strategies ask of a cache

    def activate_past_recording(self) -> None:
        """Called before assisted generation."""
        if self._transcript is not None:
            raise ValueError(
                "Assisted generation brings several tokens at a time, which counts as a new turn: leave keep out."
            )
        super().activate_past_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by those at ``beam_idx``, in that order, for beam search."""
        self._select_sequences(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at ``indices``."""
        self._select_sequences(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times in a row."""
        self._select_sequences(torch.arange(len(self.prompt.spans)).repeat_interleave(repeats))

    def _select_sequences(self, indices: Any) -> None:
        index = torch.as_tensor(indices).cpu()
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        sequences = index.tolist()
        self.prompt = self.prompt.select(sequences)
        self.host = [self.host[sequence] for sequence in sequences if self.host]
        if self._transcript is not None:
            self._transcript.select(index)
        if self._sparsity is not None:
            self._sparsity = [[layer[sequence] for sequence in sequences] for layer in self._sparsity]
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.select(self.prompt, index)
            else:
                layer.reorder_cache(torch.LongTensor(sequences))
        if self.compressed[0].store is not None:
            self._gather()

    def reset(self) -> None:
        """Forget everything: the cache waits for its prompt again."""
        super().reset()
        self._start(self._located)
        if self._transcript is not None:
            self._transcript.clear()

    # What the cache holds

    def kept_positions(self, layer: int) -> Tensor:
        """Prompt positions that each KV head of a layer holds.

        Returns:
            int64 ``[B, H_kv, n]``, ascending, -1 where a shorter row ends. Positions index ``input_ids``.

        Raises:
            ValueError: the prompt has not been compressed yet, or the layer is not one that is compressed.
        """
        store = self._store(layer)
        length = self.prompt.length
        positions = store.positions.long().unflatten(0, (-1, store.heads))
        of_prompt = (positions >= 0) & (positions < length)
        ordered = positions.masked_fill(~of_prompt, length).sort(-1).values[..., : int(of_prompt.sum(-1).max())]
        return ordered.masked_fill(ordered == length, -1)

    def entries(self, layer: int, sequence: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """What one KV head of one sequence holds in a layer.

        Returns:
            Positions int32 ``[n]``, ascending, and the keys and values there, ``[n, D]``.

        Raises:
            ValueError: as :meth:`kept_positions`.
        """
        store = self._store(layer)
        return store.entries(sequence * store.heads + head)

    def _store(self, layer: int) -> KVStore:
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"There is no layer {layer}: the model has layers 0 to {len(self.layers) - 1}.")
        found = self.layers[layer]
        if not isinstance(found, CompressedLayer):
            raise ValueError(f"Layer {layer} is not compressed: it is not one of plain full attention.")
        if found.store is None:
            raise ValueError("Nothing is compressed yet: the model has not processed the complete prompt.")
        return found.store

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of the cache occupy."""
        return sum(layer_bytes(layer) for layer in self.layers)

    def report(self) -> Report:
        """Entries kept and held, sparsity, and bytes against the full cache's."""
        for layer in self.compressed:
            # They do not count the tokens seen with static storage.
            layer.sync_lengths()
        compacted = [(layer, layer.store) for layer in self.compressed if layer.store is not None]
        others = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        return Report(
            method=self.recipe.name,
            layers=[index for index, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)],
            budget=self.recipe.budget,
            prompt_tokens=[span.length for span in self.prompt.spans],
            vision_tokens=self.prompt.vision_tokens,
            tokens_seen=self.compressed[0].seen,
            exact=all(layer.exact for layer in self.compressed),
            cut_short=[index for index, layer in enumerate(self.layers) if getattr(layer, "cut_short", False)],
            kept=[store.by_head(layer.kept) for layer, store in compacted],
            held=[store.by_head(store.held.tolist()) for _, store in compacted],
            sparsity=self._sparsity,
            entry_bytes=sum(layer.entry_bytes for layer in self.compressed) + sum(map(layer_bytes, others)),
            bytes_held=self.nbytes,
            full_bytes=sum(layer.full_bytes for layer in self.compressed) + sum(map(layer_bytes, others)),
            host_bytes=sum(copied.nbytes for copied in set(self.host)),
        )


def compressible(config: Any) -> list[int]:
    """The layers of a language part, by its config, that hold every token: the others are bounded already."""
    return [index for index, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]


def check_keep(model: PreTrainedModel) -> None:
    """Raise ValueError unless prompts can be kept in host memory and continued from there."""
    config, family = language_part(model).config, family_of(model.config)
    if len(compressible(config)) < len(DynamicCache(config=config).layers):
        raise ValueError(
            f"{type(model).__name__} has layers with a sliding window or linear attention, which cannot go back to "
            "earlier tokens: its prompts cannot be kept in host memory."
        )
    if family is not None and not family.chunked_prefill:
        raise ValueError(
            f"{type(model).__name__} cannot process a prompt in parts: its prompts cannot be kept in host memory."
        )


def language_part(model: PreTrainedModel) -> PreTrainedModel:
    """The module of a model that generates text.

    Raises:
        ValueError: it has none.
    """
    language = model.get_decoder() if getattr(model, "can_generate", lambda: False)() else None
    if language is None or language.config is not model.config.get_text_config(decoder=True):
        raise ValueError(f"{type(model).__name__} has no language part that generates text: nothing to compress.")
    return language


def _prefill_of(layer: Any) -> Prefill | None:
    return layer.prefill if isinstance(layer, CompressedLayer) else None


def layer_bytes(layer: Any) -> int:
    """Bytes that one layer's tensors occupy."""
    if isinstance(layer, CompressedLayer):
        return layer.nbytes
    states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for name in LINEAR_STATES:
        states += getattr(layer, name, {}).values()
    return sum(state.nbytes for state in states if state is not None)
