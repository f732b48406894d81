"""The prefill of one prompt, chunk by chunk."""

import time
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.cache import CompressedCache, Report
from sparsight.compression.recipe import Recipe
from sparsight.engine.positions import prompt_positions
from sparsight.engine.prefix_memory import PrefixMemory
from sparsight.engine.prompt_chain import Chain, chain_of
from sparsight.engine.vision_cache import VisionCache, slice_features, vision_places
from sparsight.models.families import family_of


class PromptRunner:
    """Runs a model over one prompt and compresses it.

    Chunks do not change the result: statistics come from all keys and the queries that the method looks at. Prompts of
    families in which image tokens attend to later ones, or that need all images at once, run unchunked.

    Args:
        model: an unmodified transformers model.
        recipe: how the prompt is compressed.
        inputs: what the processor returned for it, on the model's device.
        chunk: tokens of a chunk, the last one of which may be longer by a quarter; None for all.
        vision: where features of images that were seen before are.
        bound: as :class:`~sparsight.CompressedCache` takes it; the prompt must then run unchunked to be exact.
        prefixes: where keys and values of prompts that were processed before are.
        salt: only prompts and images of the same salt are looked at.
        capacity: ``max_new_tokens`` of the cache, where decode steps are to be captured.
        host_dtype: as :class:`~sparsight.CompressedCache` takes it.

    Attributes:
        sequence: index of the prompt in the cache.
        cache: the cache, compressed once :meth:`step` has returned logits.
        next_position: position of the first token of the answer.
        reused_tokens: how many of the prompt's first tokens are not computed, since an earlier prompt had them.
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
        prefixes: PrefixMemory | None = None,
        salt: str = "",
        capacity: int | None = None,
        host_dtype: str | None = None,
    ) -> None:
        started = time.perf_counter()
        self.model = model
        self.cache = CompressedCache(model, recipe, inputs, capacity, bound, host_dtype=host_dtype)
        self.cache.copies_prompt |= prefixes is not None
        self._positions, self.next_position = prompt_positions(model, inputs)
        self._vision, self._media = vision, vision.media(inputs, salt)
        self._prefixes, self._salt, self._ids = prefixes, salt, inputs["input_ids"]
        self.reused_tokens = self._reuse(prefixes) if prefixes is not None else 0
        # How many images lie in what is reused, and their vision tokens.
        skip, self._skipped = {}, {}
        for modality, places in self._places().items():
            ends = [end for end in accumulate(vision.tokens_of(self._media[modality])) if end <= len(places)]
            skip[modality] = sum(int(places[end - 1]) < self.reused_tokens for end in ends)
            self._skipped[modality] = ends[skip[modality] - 1] if skip[modality] else 0
        prompt = {name: value for name, value in inputs.items() if name != "labels"}
        self._inputs = vision.encode(prompt, self._media, skip)
        family = family_of(model.config)
        self._chunk = chunk if family is None or family.chunked_prefill else None
        self._done = self.reused_tokens
        self.seconds = time.perf_counter() - started

    def _places(self) -> dict[str, Tensor]:
        """Where the vision tokens of each modality are in the prompt."""
        config = self.model.config
        return {modality: vision_places(config, self._media, modality, self._ids) for modality in self._media}

    def _reuse(self, prefixes: PrefixMemory) -> int:
        """Begin the prefill with what is known of the prompt; how many tokens that is."""
        found = prefixes.find(self._chain())
        return 0 if found is None else self.cache.resume([found])

    def _chain(self) -> Chain:
        """The prompt's chain, as exact as the numbers of its images' vision tokens are known."""
        contents: dict[int, bytes] = {}
        for modality, places in self._places().items():
            keys, begins = self._media[modality].keys, [0, *accumulate(self._vision.tokens_of(self._media[modality]))]
            for number, begin in enumerate(begins[: len(keys)]):
                if begin >= len(places):
                    # The model refuses the prompt: it has more images than tokens for them.
                    break
                # From where the next image begins is not known, all that follow count.
                last = number + 1 if number + 1 < len(begins) else len(keys)
                contents[int(places[begin])] = b"".join(keys[number:last])
        return chain_of(self._ids, self._positions, contents, self._salt)

    def remember(self) -> None:
        """Keep the prompt's keys and values for later prompts, once it is complete."""
        if self._prefixes is not None:
            media = self._media.values()
            counts = {
                key: count
                for each in media
                for key, count in zip(each.keys, self._vision.tokens_of(each), strict=False)
            }
            self._prefixes.put(self._chain(), self.cache.host[0], counts)

    @property
    def input_ids(self) -> Tensor:
        """Token ids of the prompt, ``[1, T]``."""
        return self._ids

    @cached_property
    def report(self) -> Report:
        """What the cache kept of the prompt."""
        return self.cache.report()

    def kept_positions(self) -> dict[int, Tensor]:
        """Positions that each KV head keeps, int32 ``[H_kv, n]`` on the CPU, by number of the compressed layer."""
        return {layer: self.cache.kept_positions(layer)[0].int().cpu() for layer in self.report.layers}

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """Run the next chunk; logits ``[1, V]`` of the answer's first token after the last one."""
        started, length = time.perf_counter(), self.input_ids.shape[1]
        start, stop = self._done, min(self._done + (self._chunk or length), length)
        # A short rest is not worth a pass of its own, and a single token would be taken for the answer's.
        stop = length if length - stop <= max(1, (stop - start) // 4) else stop
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
            inputs["mm_encoder_outputs"] = slice_features(
                self.model.config, encoded, self.input_ids, start, stop, self._skipped
            )
        return inputs
