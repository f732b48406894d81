"""Answering rows in batches: prompts are compressed one by one and decode together.

So the full cache of no more than one prompt exists at a time, how many rows fit is a matter of their compressed caches,
and a row is compressed exactly as it is alone.
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
from sparsight.batch_inference.preparation import Preparation, Prepared, RowError, prepared
from sparsight.batch_inference.rows import Row
from sparsight.cache import CompressedCache
from sparsight.compression.recipe import Recipe

T = TypeVar("T")

MOST_ROWS = 64
"""Rows that decode together unless told otherwise, if there is room for them."""

SHARE = 0.7
"""Share of the free memory that caches may take; the rest is for prefill and for what decoding computes."""

SIMILAR = 1.25
"""Prompts of a group are at most so many times as long as its shortest."""


@dataclass(frozen=True)
class RunningSequence:
    """A row whose prompt has been prefilled and compressed.

    Args:
        row: the row.
        ids: its tokens, ``[1, T]``.
        first: the first token of the answer, ``[1, 1]``.
        cache: what was kept.
        rope_deltas: what the model's modules remember of the prompt for positions that are no plain numbers.
        need: bytes that the cache takes when the answer is complete.
        result: what is known of the result.
        seconds: how long it took.
    """

    row: Row
    ids: Tensor
    first: Tensor
    cache: CompressedCache
    rope_deltas: tuple[Tensor, ...]
    need: int
    result: dict[str, Any]
    seconds: float


class Answerer:
    """Answers rows with a model.

    Args:
        model: an unmodified transformers model.
        preparation: what the rows are prepared for.
        recipe: how their caches are compressed.
        batch_size: rows that decode together, if there is room for them; :data:`MOST_ROWS` if None.
    """

    def __init__(self, model: Any, preparation: Preparation, recipe: Recipe, batch_size: int | None = None) -> None:
        self.model, self.preparation, self.recipe = model, preparation, recipe
        self.batch_size = batch_size or MOST_ROWS
        self._room: float | None = None
        self._waiting: dict[int, list[RunningSequence]] = {}
        end = model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])

    def answer(self, rows: Iterable[Prepared]) -> Iterator[list[Result]]:
        """Results of all rows, as they come."""
        for row in rows:
            yield from self._take(*row)
        while self._waiting:
            yield from self._decode_most()

    def _take(self, row: Row, inputs: Any) -> Iterator[list[Result]]:
        """Begin a row, and decode rows when there are as many as may be."""
        begun = inputs if isinstance(inputs, RowError) else _unless_out_of_memory(self._begin, row, inputs)
        while begun is None and self._waiting:
            yield from self._decode_most()
            begun = _unless_out_of_memory(self._begin, row, inputs)
        if isinstance(begun, RunningSequence):
            # Rows of similar length, because what a row lacks to the longest of its batch is memory wasted.
            similar = self._waiting.setdefault(self._similar(begun.ids.shape[1]), [])
            similar.append(begun)
            if len(similar) >= self.batch_size or self._is_full(begun):
                yield from self._decode_most()
        else:
            yield [_failed(row, begun or OUT_OF_MEMORY)]

    def _similar(self, length: int) -> int:
        """What prompts of similar length have in common."""
        return int(math.log(length, SIMILAR))

    def _is_full(self, begun: RunningSequence) -> bool:
        """Whether the caches of the rows that wait will take all the room that there is for them."""
        if self._room is None:
            self._room = SHARE * _free_bytes(self.model.device) + begun.need
        return sum(each.need for similar in self._waiting.values() for each in similar) >= self._room

    def _decode_most(self) -> Iterator[list[Result]]:
        """Decode the rows of that length of which most wait; out of memory, they are done again in halves."""
        begun = self._waiting.pop(max(self._waiting, key=lambda length: len(self._waiting[length])))
        rows = [each.row for each in begun]
        results = _unless_out_of_memory(self._decode, begun)
        if results is not None:
            yield results
        elif len(rows) == 1:
            yield [_failed(rows[0], OUT_OF_MEMORY)]
        else:
            begun.clear()
            self.batch_size = len(rows) // 2
            for row in rows:
                yield from self._take(*prepared(self.preparation, row))

    @torch.no_grad()
    def _begin(self, row: Row, inputs: Any) -> RunningSequence | RowError:
        """Prefill and compress a row's prompt."""
        started = time.perf_counter()
        inputs = inputs.to(self.model.device, self.model.dtype)
        try:
            cache = CompressedCache(self.model, self.recipe, inputs)
            ids = self._generate(1, **inputs, past_key_values=cache)
        except ValueError as error:
            return RowError("refused by the model", str(error))
        report, length = cache.report(), inputs["input_ids"].shape[1]
        result = {
            "id": row.id,
            "prompt_checksum": row.checksum,
            "prompt_tokens": length,
            "kept": fmean(report.kept_per_layer()),
            "kv_bytes": report.bytes_held,
            "full_kv_bytes": report.full_bytes,
        }
        need = report.bytes_held + report.full_bytes // length * self.preparation.max_new_tokens
        deltas = tuple(module.rope_deltas for module in self._rope_modules())
        return RunningSequence(
            row, ids[:, :-1], ids[:, -1:], cache, deltas, need, result, time.perf_counter() - started
        )

    @torch.no_grad()
    def _decode(self, begun: Sequence[RunningSequence]) -> list[Result]:
        """Complete the answers of rows together."""
        started = time.perf_counter()
        answers = {each.row.id: each.first for each in begun}
        going = [each for each in begun if each.first.item() not in self._ends]
        count = self.preparation.max_new_tokens - 1
        if going and count > 0:
            cache = CompressedCache.join([each.cache for each in going])
            for index, module in enumerate(self._rope_modules()):
                module.rope_deltas = torch.cat([each.rope_deltas[index] for each in going])
            ids, valid = _padded([each.ids for each in going], [each.first for each in going])
            output = self._generate(count, input_ids=ids, attention_mask=valid, past_key_values=cache)
            answers |= {each.row.id: output[row, None, ids.shape[1] - 1 :] for row, each in enumerate(going)}
        seconds = (time.perf_counter() - started) / len(begun)
        return [self._result(each, answers[each.row.id][0].tolist(), seconds) for each in begun]

    def _generate(self, count: int, **inputs: Any) -> Tensor:
        """Greedy search for ``count`` tokens."""
        return self.model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1)

    def _rope_modules(self) -> list[Any]:
        """Modules that remember the prompts' lengths as their positions count them (Qwen-VL and its relatives)."""
        return [module for module in self.model.modules() if isinstance(getattr(module, "rope_deltas", None), Tensor)]

    def _result(self, begun: RunningSequence, tokens: list[int], seconds: float) -> Result:
        ends = [place for place, token in enumerate(tokens) if token in self._ends]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        return Result(
            **begun.result,
            text=self.preparation.checkpoint.processor.tokenizer.decode(tokens, skip_special_tokens=True),
            finish_reason="stop" if ends else "length",
            tokens=len(tokens),
            seconds=begun.seconds + seconds,
        )


OUT_OF_MEMORY = RowError("out of memory", "There is not enough memory for this prompt even alone.")


def _failed(row: Row, error: RowError) -> Result:
    return Result(row.id, row.checksum, error=error.sentence, error_kind=error.kind)


def _padded(prompts: Sequence[Tensor], firsts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts ``[1, T]`` and the tokens after them ``[1, 1]``, as token ids and mask ``[B, longest T + 1]``."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids, valid = [], []
    for prompt, first in zip(prompts, firsts, strict=True):
        missing = longest - prompt.shape[1]
        # A token of the row's own, so that logits processors find none in a row that it does not have alone.
        ids.append(torch.cat([prompt[:, :1].expand(-1, missing), prompt, first], dim=1))
        valid.append(functional.pad(torch.ones_like(ids[-1][:, missing:]), (missing, 0)))
    return torch.cat(ids), torch.cat(valid)


def _unless_out_of_memory(call: Callable[..., T], *arguments: Any) -> T | None:
    """What a call returns, or None if there was not enough memory for it; what it took is free again."""
    try:
        return call(*arguments)
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch raises RuntimeError alone.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved
