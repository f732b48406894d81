"""The prefill of one prompt, chunk by chunk."""

import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.cache import CompressedCache, Report
from sparsight.compression.recipe import Recipe
from sparsight.engine.positions import prompt_positions
from sparsight.engine.vision_cache import VisionCache, slice_features
from sparsight.models.families import family_of


class PromptRunner:
    """Runs a model over one prompt and compresses it.

    Chunks do not change the result: statistics come from all keys and the queries that the method looks at. Prompts of
    families in which image tokens attend to later ones, or that need all images at once, run unchunked.

    Args:
        model: an unmodified transformers model.
        recipe: how the prompt is compressed.
        inputs: what the processor returned for it, on the model's device.
        chunk: tokens of a chunk; None for all.
        vision: where features of images that were seen before are.
        bound: as :class:`~sparsight.CompressedCache` takes it; the prompt must then run unchunked to be exact.
        capacity: ``max_new_tokens`` of the cache, where decode steps are to be captured.

    Attributes:
        sequence: index of the prompt in the cache.
        cache: the cache, compressed once :meth:`step` has returned logits.
        next_position: position of the first token of the answer.
        seconds: time that the prompt has taken, its images included.

    Raises:
        ValueError: the prompt is refused by :class:`~sparsight.CompressedCache`.
    """

    sequence = 0

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        inputs: Mapping[str, Any],
        chunk: int | None,
        vision: VisionCache,
        bound: float | None = None,
        capacity: int | None = None,
    ) -> None:
        started = time.perf_counter()
        self.model = model
        self.cache = CompressedCache(model, recipe, inputs, capacity, bound)
        self._positions, self.next_position = prompt_positions(model, inputs)
        self._inputs = vision.encode({name: value for name, value in inputs.items() if name != "labels"})
        family = family_of(model.config)
        self._chunk = chunk if family is None or family.chunked_prefill else None
        self._done = 0
        self.seconds = time.perf_counter() - started

    @property
    def input_ids(self) -> Tensor:
        """Token ids of the prompt, ``[1, T]``."""
        ids: Tensor = self._inputs["input_ids"]
        return ids

    @cached_property
    def report(self) -> Report:
        """What the cache kept of the prompt."""
        return self.cache.report()

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """Run the next chunk; logits ``[1, V]`` of the answer's first token after the last one."""
        started, length = time.perf_counter(), self.input_ids.shape[1]
        start, stop = self._done, min(self._done + (self._chunk or length), length)
        # A chunk of one token would be taken for the answer's.
        stop = length if length - stop == 1 else stop
        inputs = self._inputs if stop - start == length else self._part(start, stop)
        positions = self._positions[..., start:stop]
        output: Any = self.model(**inputs, position_ids=positions, past_key_values=self.cache, logits_to_keep=1)
        self._done = stop
        self.seconds += time.perf_counter() - started
        return output.logits[:, -1] if stop == length else None

    def _part(self, start: int, stop: int) -> dict[str, Any]:
        encoded = self._inputs.get("mm_encoder_outputs")
        inputs: dict[str, Any] = {"input_ids": self.input_ids[:, start:stop]}
        if encoded:
            inputs["mm_encoder_outputs"] = slice_features(self.model.config, encoded, self.input_ids, start, stop)
        return inputs
