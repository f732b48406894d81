"""One prefill for all methods: what the prompt's attention layers were given, and any recipe's cache made from it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.attention.function import is_causal, visible
from sparsight.cache import CompressedCache
from sparsight.cache.layer import CompressedLayer
from sparsight.cache.prefill import Prefill
from sparsight.compression import Allocate, Score
from sparsight.compression.recipe import Recipe
from sparsight.methods import Full
from sparsight.models.prompt import locate


@dataclass(frozen=True)
class States:
    """What one attention layer was given for a whole prompt.

    Args:
        query: ``[B, H, T, D]``, after RoPE.
        key: ``[B, H_kv, T, D]``, after RoPE.
        value: ``[B, H_kv, T, D]``.
        scaling: factor of the logits.
        visible: bool ``[B or 1, 1, T, T]``, the keys that each query sees; None for those before it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    visible: Tensor | None


class PrefillSnapshot:
    """Prompts that the model has seen once, from which the caches of any number of recipes are made.

    A prompt attends to all of itself whatever the recipe, so that one prefill serves them all. A cache made here holds
    what a :class:`~sparsight.CompressedCache` would hold after a prefill of its own, up to rounding. Models that
    remember positions of the prompt they saw last, as Qwen2.5-VL does, must not see another one while the caches are in
    use.

    Args:
        model: an unmodified transformers model.
        inputs: what the processor returned for the prompts, on the model's device.

    Attributes:
        prompt: where things are in the prompts.
        logits: of the first token of each answer, ``[B, V]``.
        states: :class:`States` of each layer that can be compressed.

    Raises:
        ValueError: the model or the inputs cannot be used with a :class:`~sparsight.CompressedCache`.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self._recorder = _Recorder(model, Full(), inputs)
        self.prompt = locate(model.config, inputs, grids=True)
        self.logits = next_logits(model, self._recorder, inputs)
        self.states = self._recorder.states
        self._observed: dict[tuple[Score, Allocate], list[Prefill]] = {}

    @torch.inference_mode()
    def observe(self, recipe: Recipe) -> list[Prefill]:
        """What a recipe observes of the prompts, one :class:`Prefill` a layer, still to be finished.

        Recipes with the same score and the same allocation observe the same.
        """
        parts = recipe.score, recipe.allocate
        if parts not in self._observed:
            observed = []
            for states in self.states:
                prefill = Prefill(recipe, self.prompt, states.key, states.value)
                prefill.observe(states.query, states.scaling, states.visible)
                observed.append(prefill)
            self._observed[parts] = observed
        return [_of(recipe, prefill) for prefill in self._observed[parts]]

    @torch.inference_mode()
    def cache(self, recipe: Recipe) -> CompressedCache:
        """A recipe's cache, as it is after prefill."""
        cache = CompressedCache(self.model, recipe, self.inputs)
        for index, layer in enumerate(self._recorder.layers):
            if not isinstance(layer, CompressedLayer):
                cache.layers[index] = copy.deepcopy(layer)
        cache.adopt(self.observe(recipe))
        return cache


class _Recorder(CompressedCache):
    """A cache that keeps what its layers were given, and compresses nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.states: list[States] = []

    def _attend(
        self, layer: CompressedLayer, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # The key itself knows this cache: keeping it would keep the cache for ever.
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        seen = None if is_causal(mask, self.prompt.valid_mask) else visible(mask)
        self.states.append(States(query.detach(), key.detach(), value.detach(), scaling, seen))
        return super()._attend(layer, module, query, key, value, mask, **kwargs)

    def _compact(self) -> None:
        for layer in self.compressed:
            layer.prefill = None


def next_logits(model: Any, cache: CompressedCache, inputs: Mapping[str, Any]) -> Tensor:
    """Let the model see what it has not seen of the inputs, and return the logits of what comes next, ``[B, V]``."""
    output = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0]


def _of(recipe: Recipe, prefill: Prefill) -> Prefill:
    """A prefill of the same prompt for another recipe that observes the same; finishing it leaves the first alone."""
    own = copy.copy(prefill)
    own.recipe = recipe
    return own
