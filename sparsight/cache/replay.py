"""A second pass of the language part over the prompt, for scores that watch the model repeat it.

The prompt is repeated as the embeddings that the language part was given in the prefill, so images are too, without
another run of the vision tower. Positions continue after the prompt; with multimodal RoPE an image keeps its grid.
Attention within the repetition is causal, also in models whose image tokens attend to each other in both directions.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from sparsight.attention.interface import is_plain, mark, own_attention
from sparsight.cache.language_inputs import LanguageInputs
from sparsight.cache.prefill import Prefill
from sparsight.compression import Reconstruction
from sparsight.compression.reconstruction import LEAD, largest_attention
from sparsight.models.prompt import Prompt, Span


class _RepeatingCache(Cache):
    """One sequence of a prefilled cache, for a single forward pass whose tokens attend to the prompt and each other.

    Args:
        layers: of the prefilled cache.
        prefills: the prompt in those layers that are compressed, by index.
        sequence: which one.
        watch: called with the index, queries ``[H, r, D]``, keys ``[H_kv, seen + r, D]`` and scaling of each of them;
            if ``attends``, also with its values and where the queries' attention ``[H, r, D]`` goes.
        attends: whether ``watch`` can compute the attention too: what is repeated is all of the prompt.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        prefills: Mapping[int, Prefill],
        sequence: int,
        watch: Callable[..., None],
        attends: bool,
    ) -> None:
        states = [layer if index in prefills else copy.deepcopy(layer) for index, layer in enumerate(layers)]
        for index, prefill in prefills.items():
            states[index] = held = DynamicLayer()
            held.keys, held.values = (each[sequence : sequence + 1] for each in (prefill.keys, prefill.values))
            held.dtype, held.device, held.is_initialized = held.keys.dtype, held.keys.device, True
        for index, layer in enumerate(states):
            if index not in prefills:
                layer.reorder_cache(torch.LongTensor([sequence]))
        super().__init__(layers=states)
        self.prefills, self.watch, self.attends = prefills, watch, attends

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, H_kv, seen + r, D]``; those of the compressed layers are not added to the cache."""
        if layer_idx not in self.prefills:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        held: Any = self.layers[layer_idx]
        key, value = torch.cat([held.keys, key_states], dim=2), torch.cat([held.values, value_states], dim=2)
        return mark(key, partial(self._attend, layer_idx)), value

    def _attend(
        self, index: int, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if self.attends and is_plain(module, query, key, value, **kwargs):
            output = value.new_empty(*query.shape[:3], value.shape[-1])
            self.watch(index, query[0], key[0], scaling, value[0], output[0])
            return output.transpose(1, 2), None
        self.watch(index, query[0], key[0], scaling)
        return own_attention(module, query, key, value, mask, **kwargs)


@torch.no_grad()
def replay(
    inputs: LanguageInputs,
    layers: Sequence[Any],
    prefills: Mapping[int, Prefill],
    prompt: Prompt,
    score: Reconstruction,
) -> None:
    """Repeat every prompt, and put the largest attention that its positions receive into the prefills.

    Args:
        inputs: the prompts' tokens.
        layers: of the cache, after the prefill.
        prefills: the prompt in those layers that are compressed, by index.
        prompt: lengths and masks.
        score: what is repeated, and how.
    """
    device = inputs.embeddings.device
    assert score.instructions is not None
    for sequence, span in enumerate(prompt.spans):
        last = inputs.positions[:, sequence, span.start : span.stop].amax()
        for first in range(span.start, span.stop, score.chunk):
            tokens = slice(first, min(first + score.chunk, span.stop))
            lead = slice(max(first - LEAD, span.start), tokens.stop)
            ids = score.instructions[first > span.start]
            arguments = inputs.repeat(sequence, lead, ids, last + 1)
            watch = partial(_watch, prefills, sequence, span, tokens, score.sinks)
            seen = next(iter(prefills.values())).seen
            attends = tokens == slice(span.start, seen)
            cache = _RepeatingCache(layers, prefills, sequence, watch, attends)
            # Assisted generation has brought tokens after the prompt, which are no part of it.
            mask = torch.zeros(1, seen + arguments["inputs_embeds"].shape[1], dtype=torch.long, device=device)
            mask[0, : prompt.length] = prompt.valid_mask[sequence]
            mask[:, seen:] = 1
            inputs.language(**arguments, attention_mask=mask, past_key_values=cache, use_cache=True)


def _watch(
    prefills: Mapping[int, Prefill],
    sequence: int,
    span: Span,
    tokens: slice,
    sinks: int,
    index: int,
    query: Tensor,
    key: Tensor,
    scaling: float,
    value: Tensor | None = None,
    output: Tensor | None = None,
) -> None:
    """Note the attention that the queries ``[H, r, D]`` of one layer pay to the tokens that are repeated."""
    in_front = slice(span.start, min(span.start + sinks, tokens.start))
    context = torch.cat([key[:, in_front], key[:, tokens]], dim=1)
    values = None if value is None else value[:, span.start :]
    received = largest_attention(query, context, key[:, -query.shape[1] :], scaling, values, output)
    total = prefills[index].attention[sequence].total
    total[:, tokens.start - span.start : tokens.stop - span.start] = received[:, in_front.stop - in_front.start :]
