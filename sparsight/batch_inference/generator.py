"""Batched generation: rows join the engine's running batch as there is memory for them, and leave as they end."""

import gc
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from statistics import fmean
from typing import Any

import torch

from sparsight.batch_inference.preprocessing import OUT_OF_MEMORY, Preprocessed, Preprocessor, RowError, preprocess
from sparsight.batch_inference.result import Result
from sparsight.batch_inference.rows import Row
from sparsight.compression.recipe import Recipe
from sparsight.engine.engine import Engine
from sparsight.engine.request import Handle, OutOfMemoryError
from sparsight.engine.sampling import SamplingParams

MAX_BATCH_SIZE = 128
"""Sequences that decode together by default, if their caches fit in memory."""

CACHE_MEMORY_FRACTION = 0.7
"""Fraction of the free memory that caches may take; prefill and activations need the rest."""

MAX_WAITING = 2
"""Preprocessed rows that wait in the engine for their prefill."""

VISION_BYTES = 2**25
"""Bytes of vision features that are kept for further rows with the same image."""


class BatchGenerator:
    """Generates the answers to rows with one model.

    Args:
        model: an unmodified transformers model.
        preprocessor: makes the model's inputs; used again for rows that ran out of memory.
        recipe: how caches are compressed.
        batch_size: sequences that decode together, if they fit in memory; :data:`MAX_BATCH_SIZE` if None.
        prefill_bound: as :class:`~sparsight.CompressedCache` takes it.
        host_memory: as :class:`~sparsight.Engine` takes it.
        host_dtype: as :class:`~sparsight.Engine` takes it.
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Preprocessor,
        recipe: Recipe,
        batch_size: int | None = None,
        prefill_bound: float | None = None,
        host_memory: int = 0,
        host_dtype: str | None = None,
    ) -> None:
        self.preprocessor, self._tokenizer = preprocessor, preprocessor.checkpoint.processor.tokenizer
        # Without a processor: results are decoded once, at their end, not token by token.
        self.engine = Engine(
            model,
            None,
            recipe,
            kv_memory=CACHE_MEMORY_FRACTION,
            max_running=batch_size or MAX_BATCH_SIZE,
            prefill_chunk=None,
            prefill_bound=prefill_bound,
            vision_bytes=VISION_BYTES,
            host_memory=host_memory,
            host_dtype=host_dtype,
        )
        self._params = SamplingParams.from_generation_config(
            model.generation_config, temperature=0.0, max_new_tokens=preprocessor.max_new_tokens
        )
        # Rows in the engine, each with the share of the time when it was added, and rows that ran out of memory there.
        self._asked: dict[Handle, tuple[Row, float]] = {}
        self._retried: deque[Row] = deque()
        # Time that the engine has worked, each step divided by the rows that it had.
        self._share = 0.0

    def generate(self, rows: Iterable[Preprocessed]) -> Generator[list[Result], None, None]:
        """Results of all rows as soon as they are known, those that are known at the same time together."""
        for row, inputs in rows:
            yield from self._ask(row, inputs)
            while self.engine.waiting >= MAX_WAITING:
                yield from self._step()
            if self._retried:
                yield from self._finish()
        yield from self._finish()

    def close(self) -> None:
        """Stop generating."""
        self.engine.close()

    def params(self, row: Row) -> SamplingParams:
        """How a row is answered; a subclass may choose for each."""
        return self._params

    def _ask(self, row: Row, inputs: Any) -> Iterator[list[Result]]:
        if isinstance(inputs, RowError):
            yield [_failed(row, inputs)]
        else:
            self._asked[self.engine.add(inputs=inputs, params=self.params(row))] = row, self._share

    def _finish(self) -> Iterator[list[Result]]:
        """Complete the rows in the engine; then each that has run out of memory, alone."""
        while self._asked:
            yield from self._step()
        while self._retried:
            _free_memory()
            yield from self._ask(*preprocess(self.preprocessor, self._retried.popleft()))
            while self._asked:
                yield from self._step()

    def _step(self) -> Iterator[list[Result]]:
        """Let the engine work, and collect what has ended."""
        started = time.perf_counter()
        self.engine.step()
        self._share += (time.perf_counter() - started) / len(self._asked)
        alone, results = len(self._asked) == 1, []
        for handle in [each for each in self._asked if each.done]:
            row, share = self._asked.pop(handle)
            if isinstance(handle.error, OutOfMemoryError) and not alone:
                self._retried.append(row)
                if handle.started:
                    self.engine.max_running = max(1, self.engine.running)
            else:
                results.append(self._result(row, handle, self._share - share))
        if results:
            yield results

    def _result(self, row: Row, handle: Handle, seconds: float) -> Result:
        if isinstance(handle.error, OutOfMemoryError):
            return _failed(row, OUT_OF_MEMORY)
        if handle.error is not None:
            cause = handle.error.__cause__
            if isinstance(cause, ValueError):
                return _failed(row, RowError("refused by the model", str(cause)))
            raise cause or handle.error
        (completion,) = handle.completions
        report = completion.report
        return Result(
            **_row_fields(row),
            text=self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            finish_reason=completion.finish_reason,
            prompt_tokens=report.prompt_tokens[0],
            tokens=len(completion.tokens),
            kept=fmean(report.kept_per_layer()),
            kv_bytes=report.bytes_held,
            full_kv_bytes=report.full_bytes,
            seconds=seconds,
        )


def _failed(row: Row, error: RowError) -> Result:
    return Result(**_row_fields(row), error=error.sentence, error_kind=error.kind)


def _row_fields(row: Row) -> dict[str, Any]:
    """The fields of a result that are its row's."""
    return {"id": row.id, "row": row.number, "prompt_checksum": row.checksum, "fields": row.fields}


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
