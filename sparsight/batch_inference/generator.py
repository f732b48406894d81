"""Batched generation: prompts are prefilled and compressed one by one, and decode together.

Only one prompt's full cache exists at a time, so the compressed caches decide how many sequences fit in memory, and
every prompt is compressed exactly as it would be alone.
"""

import gc
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import fmean
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.nn import functional
from transformers import StoppingCriteria, StoppingCriteriaList

from sparsight.batch_inference.preprocessing import OUT_OF_MEMORY, Preprocessed, Preprocessor, RowError, preprocess
from sparsight.batch_inference.result import Result
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
        statistics: the fields of the result that are known after prefill, without those of the row.
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
        prefill_bound: as :class:`~sparsight.CompressedCache` takes it.
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Preprocessor,
        recipe: Recipe,
        batch_size: int | None = None,
        prefill_bound: float | None = None,
    ) -> None:
        self.model, self.preprocessor, self.recipe, self.prefill_bound = model, preprocessor, recipe, prefill_bound
        self.batch_size = batch_size or MAX_BATCH_SIZE
        self._cache_bytes_limit: float | None = None
        self._waiting: dict[int, list[PrefilledSequence]] = {}
        eos = model.generation_config.eos_token_id
        self._eos_token_ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def generate(self, rows: Iterable[Preprocessed]) -> Generator[list[Result], None, None]:
        """Results of all rows as soon as they are known, those that are known at the same time together."""
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
        if not isinstance(sequence, PrefilledSequence):
            yield [_failed(row, sequence or OUT_OF_MEMORY)]
        elif self.preprocessor.max_new_tokens == 1 or sequence.first_token.item() in self._eos_token_ids:
            yield [self._result(sequence, sequence.first_token[0].tolist(), 0.0)]
        else:
            # Sequences of similar length decode together, because padding to the longest wastes memory.
            group = self._waiting.setdefault(self._length_group(sequence.ids.shape[1]), [])
            group.append(sequence)
            if len(group) >= self.batch_size or self._is_memory_full(sequence):
                yield from self._decode_largest_group()

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
        size = len(sequences)
        remaining = {sequence.row.key: sequence.row for sequence in sequences}
        try:
            for results in self._decode(sequences):
                for result in results:
                    del remaining[result.key]
                yield results
            return
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        sequences.clear()
        _free_memory()
        if size == 1:
            yield [_failed(row, OUT_OF_MEMORY) for row in remaining.values()]
        else:
            self.batch_size = size // 2
            for row in remaining.values():
                yield from self._add(*preprocess(self.preprocessor, row))

    @torch.no_grad()
    def _prefill(self, row: Row, inputs: Any) -> PrefilledSequence | RowError:
        """Prefill and compress a row's prompt."""
        started = time.perf_counter()
        inputs = inputs.to(self.model.device, self.model.dtype)
        try:
            cache = CompressedCache(self.model, self.recipe, inputs, prefill_bound=self.prefill_bound)
            ids = self._generate(1, **inputs, past_key_values=cache)
        except ValueError as error:
            return RowError("refused by the model", str(error))
        report, length = cache.report(), inputs["input_ids"].shape[1]
        statistics = {
            "prompt_tokens": length,
            "kept": fmean(report.kept_per_layer()),
            "kv_bytes": report.bytes_held,
            "full_kv_bytes": report.full_bytes,
        }
        final_bytes = report.bytes_held + report.full_bytes // length * self.preprocessor.max_new_tokens
        deltas = tuple(module.rope_deltas for module in self._rope_modules())
        seconds = time.perf_counter() - started
        return PrefilledSequence(row, ids[:, :-1], ids[:, -1:], cache, deltas, final_bytes, statistics, seconds)

    def _decode(self, sequences: Sequence[PrefilledSequence]) -> Iterator[list[Result]]:
        """Complete the answers of sequences together: results as sequences end, at last those of the longest length."""
        started = time.perf_counter()
        cache = CompressedCache.join([sequence.cache for sequence in sequences])
        for index, module in enumerate(self._rope_modules()):
            module.rope_deltas = torch.cat([sequence.rope_deltas[index] for sequence in sequences])
        ids, valid = _left_padded(sequences)
        watcher = _FinishWatcher(ids, self._eos_token_ids)
        inputs = {"input_ids": ids, "attention_mask": valid, "past_key_values": cache}
        unfinished = set(range(len(sequences)))

        def result(index: int, tokens: list[int]) -> Result:
            unfinished.discard(index)
            seconds = (time.perf_counter() - started) / len(sequences)
            return self._result(sequences[index], [*sequences[index].first_token[0].tolist(), *tokens], seconds)

        # In a thread, because generate() returns only when the last sequence has ended.
        with ThreadPoolExecutor(1) as thread:
            count, criteria = self.preprocessor.max_new_tokens - 1, StoppingCriteriaList([watcher])
            output = thread.submit(self._generate, count, **inputs, stopping_criteria=criteria)
            output.add_done_callback(lambda _: watcher.finished.put(None))
            try:
                while (finished := watcher.finished.get()) is not None:
                    yield [result(*finished)]
            finally:
                watcher.stop = True
        new = output.result()[:, ids.shape[1] :].tolist()
        if unfinished:
            yield [result(index, new[index]) for index in sorted(unfinished)]

    def _generate(self, count: int, **inputs: Any) -> Tensor:
        """Greedy search for ``count`` tokens."""
        # A new thread starts with the first GPU as its current one; this does nothing on a CPU.
        with torch.cuda.device_of(inputs["input_ids"]):
            return self.model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1)

    def _rope_modules(self) -> list[Any]:
        """Modules that store a position offset for each prompt (multimodal RoPE of Qwen-VL and its relatives)."""
        return [module for module in self.model.modules() if isinstance(getattr(module, "rope_deltas", None), Tensor)]

    def _result(self, sequence: PrefilledSequence, tokens: list[int], seconds: float) -> Result:
        ends = [index for index, token in enumerate(tokens) if token in self._eos_token_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        return Result(
            **_row_fields(sequence.row),
            **sequence.statistics,
            text=self.preprocessor.checkpoint.processor.tokenizer.decode(tokens, skip_special_tokens=True),
            finish_reason="stop" if ends else "length",
            tokens=len(tokens),
            seconds=sequence.seconds + seconds,
        )


class _FinishWatcher(StoppingCriteria):
    """Reports sequences of a batch as they end, and stops them all on request.

    Args:
        ids: tokens before the decode, ``[B, T]``.
        eos_token_ids: tokens that end a sequence.

    Attributes:
        finished: index and new tokens of each sequence that has ended; None is put after the last one by the caller.
        stop: whether all sequences end at the next step.
    """

    def __init__(self, ids: Tensor, eos_token_ids: Iterable[int]) -> None:
        self._length = ids.shape[1]
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=ids.dtype, device=ids.device)
        self._running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.finished: SimpleQueue[tuple[int, list[int]] | None] = SimpleQueue()
        self.stop = False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        ended = self._running & torch.isin(input_ids[:, -1], self._eos)
        self._running &= ~ended
        for index in ended.nonzero()[:, 0].tolist():
            self.finished.put((index, input_ids[index, self._length :].tolist()))
        return torch.full_like(ended, self.stop)


def _failed(row: Row, error: RowError) -> Result:
    return Result(**_row_fields(row), error=error.sentence, error_kind=error.kind)


def _row_fields(row: Row) -> dict[str, Any]:
    """The fields of a result that are its row's."""
    return {"id": row.id, "row": row.number, "prompt_checksum": row.checksum, "fields": row.fields}


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
        if not _is_out_of_memory(error):
            raise
    _free_memory()
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    """Free memory of a device, memory that torch has cached included."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved
