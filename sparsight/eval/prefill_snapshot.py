"""One prefill for all methods: queries, keys and values of the attention layers, from which any cache is made."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.attention.interface import is_causal, visible
from sparsight.attention.rope import Rope
from sparsight.cache import CompressedCache
from sparsight.cache.language_inputs import LanguageInputs
from sparsight.cache.layer import CompressedLayer
from sparsight.cache.prefill import Prefill, fitted
from sparsight.cache.replay import replay
from sparsight.compression import Allocate, Reconstruction, Score
from sparsight.compression.recipe import Recipe
from sparsight.engine.prefilled import next_logits
from sparsight.methods import Full, with_instructions
from sparsight.models.prompt import locate


@dataclass(frozen=True)
class States:
    """The inputs of one attention layer for the complete prompt.

    Args:
        query: ``[B, H, T, D]``, after RoPE.
        key: ``[B, H_kv, T, D]``, after RoPE.
        value: ``[B, H_kv, T, D]``.
        scaling: factor of the logits.
        visible: bool ``[B or 1, 1, T, T]``, the keys that each query attends to; None for causal attention.
        rope: RoPE of the queries.
        module: the attention layer.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    visible: Tensor | None
    rope: Rope
    module: Any


class PrefillSnapshot:
    """One prefill of some prompts, from which the caches of any number of recipes are made.

    Prompt attention is the same for all recipes, so they can share a prefill. A cache made here has the entries that a
    :class:`~sparsight.CompressedCache` would have after a prefill of its own, up to rounding. Models that keep state
    of the last prompt, such as the positions of Qwen2.5-VL, must not process another one while the caches are in use.

    Args:
        model: an unmodified transformers model.
        inputs: what the processor returned for the prompts, on the model's device.

    Attributes:
        prompt: lengths, masks and grids of the prompts.
        logits: logits of the first token of each answer, ``[B, V]``.
        states: :class:`States` of each layer that can be compressed.

    Raises:
        ValueError: the model or the inputs cannot be used with a :class:`~sparsight.CompressedCache`.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self._recorder = _Recorder(model, Full(), inputs)
        self.prompt = locate(model.config, inputs, grids=True, frames=True)
        self.logits = next_logits(model, self._recorder, inputs)
        self.states = self._recorder.states
        self._observed: dict[tuple[tuple[Score, ...], Allocate], list[Prefill]] = {}

    @torch.inference_mode()
    def observe(self, recipe: Recipe) -> list[Prefill]:
        """A recipe's statistics of the prompts, one :class:`Prefill` per layer, not finished yet.

        Recipes with the same score and the same allocation share them.
        """
        recipe = with_instructions(recipe, str(self.model.name_or_path))
        # A budget may limit a score's window.
        scores = tuple(fitted(recipe, self.prompt, sequence).score for sequence in range(len(self.prompt.spans)))
        parts = scores, recipe.allocate
        if parts not in self._observed:
            observed = []
            for states in self.states:
                prefill = Prefill(recipe, self.prompt, states.key, states.value)
                prefill.rotation = states.rope.of(states.module) if recipe.score.before_rope else None
                prefill.observe(states.query, states.scaling, states.visible)
                observed.append(prefill)
            if isinstance(recipe.score, Reconstruction):
                layers = self._recorder.layers
                compressed = [index for index, layer in enumerate(layers) if isinstance(layer, CompressedLayer)]
                by_index = dict(zip(compressed, observed, strict=True))
                replay(self._recorder.inputs, layers, by_index, self.prompt, recipe.score)
            self._observed[parts] = observed
        return [_of(recipe, prefill) for prefill in self._observed[parts]]

    @torch.inference_mode()
    def cache(self, recipe: Recipe, keep: str | None = None, host_dtype: str | None = None) -> CompressedCache:
        """A recipe's cache after prefill; the others are arguments of :class:`~sparsight.CompressedCache`."""
        cache = CompressedCache(self.model, recipe, self.inputs, keep=keep, host_dtype=host_dtype)
        for index, layer in enumerate(self._recorder.layers):
            if not isinstance(layer, CompressedLayer):
                cache.layers[index] = copy.deepcopy(layer)
        cache.adopt(self.observe(recipe), self._recorder.inputs)
        return cache


class _Recorder(CompressedCache):
    """A cache that records the inputs of its layers and compresses nothing."""

    needs_tokens = repeats_prompt = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.states: list[States] = []

    def _attend(
        self, layer: CompressedLayer, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        visible_keys = None if is_causal(mask, self.prompt.valid_mask) else visible(mask)
        output = super()._attend(layer, module, query, key, value, mask, **kwargs)
        assert self._rope is not None
        # The key refers to this cache; detached tensors do not keep it alive.
        states = query.detach(), key.detach(), value.detach()
        self.states.append(States(*states, scaling, visible_keys, self._rope, module))
        return output

    @property
    def inputs(self) -> LanguageInputs:
        """What the language part was given."""
        assert self._inputs is not None
        return self._inputs

    def _compact(self) -> None:
        for layer in self.compressed:
            layer.prefill = None


def _of(recipe: Recipe, prefill: Prefill) -> Prefill:
    """A copy of a prefill for another recipe with the same statistics; finishing it does not change the original."""
    own = copy.copy(prefill)
    own.recipe = recipe
    return own
