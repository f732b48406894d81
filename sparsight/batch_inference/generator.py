"""Batched generation: prompts are prefilled and compressed one by one, and decode together.

Only one prompt's full cache exists at a time, so the compressed caches decide how many sequences fit in memory, and
every prompt is compressed exactly as it would be alone.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from sparsight.batch_inference.output import Result
from sparsight.batch_inference.preprocessing import Preprocessed, Preprocessor, RowError, preprocess
from sparsight.batch_inference.rows import Row
from sparsight.cache import CompressedCache
from sparsight.compression.recipe import Recipe

T = TypeVar("T")

MAX_BATCH_SIZE = 64
"""Sequences that decode together by default, if their caches fit in memory."""

CACHE_MEMORY_FRACTION = 0.7
"""Fraction of the free memory that caches may take; prefill and activations need the rest."""

LENGTH_RATIO = 1.25
"""Longest prompt of a batch over its shortest, at most."""


@dataclass(frozen=True)
class PrefilledSequence:
    """A row whose prompt has been prefilled and compressed, ready to decode.

    Args:
        row: the row.
        ids: prompt tokens, ``[1, T]``.
        first_token: first token of the answer, ``[1, 1]``.
        cache: the compressed cache.
        rope_deltas: position offsets that the model's modules computed for this prompt (multimodal RoPE).
        final_bytes: size of the cache after the longest answer.
        statistics: the fields of the result that are known after prefill.
        seconds: time of the prefill.
    """

    row: Row
    ids: Tensor
    first_token: Tensor
    cache: CompressedCache
    rope_deltas: tuple[Tensor, ...]
    final_bytes: int
    statistics: dict[str, Any]
    seconds: float


class BatchGenerator:
    """Generates the answers to rows with one model.

    Args:
        model: an unmodified transformers model.
        preprocessor: makes the model's inputs; used again after a batch ran out of memory.
        recipe: how caches are compressed.
        batch_size: sequences that decode together, if they fit in memory; :data:`MAX_BATCH_SIZE` if None.
    """

    def __init__(self, model: Any, preprocessor: Preprocessor, recipe: Recipe, batch_size: int | None = None) -> None:
        self.model, self.preprocessor, self.recipe = model, preprocessor, recipe
        self.batch_size = batch_size or MAX_BATCH_SIZE
        self._cache_bytes_limit: float | None = None
        self._waiting: dict[int, list[PrefilledSequence]] = {}
        eos = model.generation_config.eos_token_id
        self._eos_token_ids = set(eos if isinstance(eos, list) else [eos])

    def generate(self, rows: Iterable[Preprocessed]) -> Iterator[list[Result]]:
        """Results of all rows, a batch at a time, in the order in which batches finish."""
        for row in rows:
            yield from self._add(*row)
        while self._waiting:
            yield from self._decode_largest_group()

    def _add(self, row: Row, inputs: Any) -> Iterator[list[Result]]:
        """Prefill a row, and decode a batch when there are enough sequences for one."""
        sequence = inputs if isinstance(inputs, RowError) else _none_if_out_of_memory(self._prefill, row, inputs)
        while sequence is None and self._waiting:
            yield from self._decode_largest_group()
            sequence = _none_if_out_of_memory(self._prefill, row, inputs)
        if isinstance(sequence, PrefilledSequence):
            # Sequences of similar length decode together, because padding to the longest wastes memory.
            group = self._waiting.setdefault(self._length_group(sequence.ids.shape[1]), [])
            group.append(sequence)
            if len(group) >= self.batch_size or self._is_memory_full(sequence):
                yield from self._decode_largest_group()
        else:
            yield [_failed(row, sequence or OUT_OF_MEMORY)]

    def _length_group(self, length: int) -> int:
        """A number that prompts of similar length share."""
        return int(math.log(length, LENGTH_RATIO))

    def _is_memory_full(self, newest: PrefilledSequence) -> bool:
        """Whether the waiting sequences' caches will fill the memory set aside for caches."""
        if self._cache_bytes_limit is None:
            self._cache_bytes_limit = CACHE_MEMORY_FRACTION * _free_bytes(self.model.device) + newest.final_bytes
        waiting = (sequence for group in self._waiting.values() for sequence in group)
        return sum(sequence.final_bytes for sequence in waiting) >= self._cache_bytes_limit

    def _decode_largest_group(self) -> Iterator[list[Result]]:
        """Decode the largest group of waiting sequences; if memory runs out, start them over in two halves."""
        sequences = self._waiting.pop(max(self._waiting, key=lambda group: len(self._waiting[group])))
        rows = [sequence.row for sequence in sequences]
        results = _none_if_out_of_memory(self._decode, sequences)
        if results is not None:
            yield results
        elif len(rows) == 1:
            yield [_failed(rows[0], OUT_OF_MEMORY)]
        else:
            sequences.clear()
            self.batch_size = len(rows) // 2
            for row in rows:
                yield from self._add(*preprocess(self.preprocessor, row))

    @torch.no_grad()
    def _prefill(self, row: Row, inputs: Any) -> PrefilledSequence | RowError:
        """Prefill and compress a row's prompt."""
        started = time.perf_counter()
        inputs = inputs.to(self.model.device, self.model.dtype)
        try:
            cache = CompressedCache(self.model, self.recipe, inputs)
            ids = self._generate(1, **inputs, past_key_values=cache)
        except ValueError as error:
            return RowError("refused by the model", str(error))
        report, length = cache.report(), inputs["input_ids"].shape[1]
        statistics = {
            "id": row.id,
            "prompt_checksum": row.checksum,
            "prompt_tokens": length,
            "kept": fmean(report.kept_per_layer()),
            "kv_bytes": report.bytes_held,
            "full_kv_bytes": report.full_bytes,
        }
        final_bytes = report.bytes_held + report.full_bytes // length * self.preprocessor.max_new_tokens
        deltas = tuple(module.rope_deltas for module in self._rope_modules())
        seconds = time.perf_counter() - started
        return PrefilledSequence(row, ids[:, :-1], ids[:, -1:], cache, deltas, final_bytes, statistics, seconds)

    @torch.no_grad()
    def _decode(self, sequences: Sequence[PrefilledSequence]) -> list[Result]:
        """Complete the answers of sequences together."""
        started = time.perf_counter()
        answers = {sequence.row.id: sequence.first_token for sequence in sequences}
        unfinished = [sequence for sequence in sequences if sequence.first_token.item() not in self._eos_token_ids]
        count = self.preprocessor.max_new_tokens - 1
        if unfinished and count > 0:
            cache = CompressedCache.join([sequence.cache for sequence in unfinished])
            for index, module in enumerate(self._rope_modules()):
                module.rope_deltas = torch.cat([sequence.rope_deltas[index] for sequence in unfinished])
            ids, valid = _left_padded(unfinished)
            output = self._generate(count, input_ids=ids, attention_mask=valid, past_key_values=cache)
            for index, sequence in enumerate(unfinished):
                answers[sequence.row.id] = output[index, None, ids.shape[1] - 1 :]
        seconds = (time.perf_counter() - started) / len(sequences)
        return [self._result(sequence, answers[sequence.row.id][0].tolist(), seconds) for sequence in sequences]

    def _generate(self, count: int, **inputs: Any) -> Tensor:
        """Greedy search for ``count`` tokens."""
        return self.model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1)

    def _rope_modules(self) -> list[Any]:
        """Modules that store a position offset for each prompt (multimodal RoPE of Qwen-VL and its relatives)."""
        return [module for module in self.model.modules() if isinstance(getattr(module, "rope_deltas", None), Tensor)]

    def _result(self, sequence: PrefilledSequence, tokens: list[int], seconds: float) -> Result:
        ends = [index for index, token in enumerate(tokens) if token in self._eos_token_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        return Result(
            **sequence.statistics,
            text=self.preprocessor.checkpoint.processor.tokenizer.decode(tokens, skip_special_tokens=True),
            finish_reason="stop" if ends else "length",
            tokens=len(tokens),
            seconds=sequence.seconds + seconds,
        )


OUT_OF_MEMORY = RowError("out of memory", "There is not enough memory for this prompt, even alone.")


def _failed(row: Row, error: RowError) -> Result:
    return Result(row.id, row.checksum, error=error.sentence, error_kind=error.kind)


def _left_padded(sequences: Sequence[PrefilledSequence]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``[B, T + 1]``, of prompts up to ``T`` long and their first tokens."""
    longest = max(sequence.ids.shape[1] for sequence in sequences)
    ids, valid = [], []
    for sequence in sequences:
        missing = longest - sequence.ids.shape[1]
        # Padding repeats a token of the prompt, so that logits processors find no token that the prompt lacks.
        padding = sequence.ids[:, :1].expand(-1, missing)
        ids.append(torch.cat([padding, sequence.ids, sequence.first_token], dim=1))
        valid.append(functional.pad(torch.ones_like(ids[-1][:, missing:]), (missing, 0)))
    return torch.cat(ids), torch.cat(valid)


def _none_if_out_of_memory(call: Callable[..., T], *arguments: Any) -> T | None:
    """What a call returns, or None if it ran out of memory; the memory that it took has been freed then."""
    try:
        return call(*arguments)
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch raises a plain RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _free_bytes(device: torch.device) -> int:
    """Free memory of a device, memory that torch has cached included."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved
