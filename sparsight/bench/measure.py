"""Measures one batch of answers: the time of each stage and the memory."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparsight.bench import machine
from sparsight.bench.machine import Stopwatch
from sparsight.cache.compressed_cache import CompressedCache, layer_bytes
from sparsight.cache.prefill import Prefill
from sparsight.engine.model_runner import decode_step


@dataclass(frozen=True)
class Sample:
    """The measurement of one batch of answers.

    Attributes:
        first_token: seconds to the first token, ``statistics`` and ``compaction`` included.
        statistics: seconds of computing statistics of the queries; None where a library does not measure them.
        compaction: seconds of planning and of copying the kept entries; None likewise.
        token: median seconds per further token.
        end_to_end: seconds of all tokens.
        bytes_held: bytes of the cache after the prefill, unused capacity included.
        entry_bytes: bytes of its keys and values, which a decode step reads.
        peak_bytes: peak of memory use; None where the machine cannot measure it.
    """

    first_token: float
    statistics: float | None
    compaction: float | None
    token: float
    end_to_end: float
    bytes_held: int
    entry_bytes: int
    peak_bytes: int | None


@torch.inference_mode()
def measure(model: PreTrainedModel, input_ids: Tensor, cache: Cache, new_tokens: int) -> Sample:
    """Answer prompts ``[B, T]`` with ``new_tokens`` greedy tokens each, starting from an empty cache."""
    device = model.device
    gc.collect()
    peak_known = machine.reset_peak(device)
    observing, compacting = Stopwatch(device), Stopwatch(device)
    with _timed(Prefill, "observe", observing), _timed(CompressedCache, "_compact", compacting):
        first_token, token = _step(model, device, input_ids, cache)
    occupied, entries = _bytes(cache)
    seconds = []
    # Steps are timed one by one, with tokens that nobody reads: not on the engine, which does more than a step.
    captured = isinstance(cache, CompressedCache) and cache.is_compileable
    decode: Callable[..., Any] = decode_step(model) if captured else model
    for _ in range(new_tokens - 1):
        step_seconds, token = _step(decode, device, token, cache)
        seconds.append(step_seconds)
    return Sample(
        first_token,
        observing.seconds(),
        compacting.seconds(),
        statistics.median(seconds),
        first_token + sum(seconds),
        occupied,
        entries,
        machine.peak_bytes(device) if peak_known else None,
    )


def _step(model: Callable[..., Any], device: torch.device, tokens: Tensor, cache: Cache) -> tuple[float, Tensor]:
    """Seconds of one forward pass, and the next tokens ``[B, 1]``."""
    machine.synchronize(device)
    start = time.perf_counter()
    token = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    machine.synchronize(device)
    return time.perf_counter() - start, token


@contextmanager
def _timed(owner: type, name: str, stopwatch: Stopwatch) -> Iterator[None]:
    """Add the time of every call of a method to a stopwatch."""
    method: Callable[..., Any] = getattr(owner, name)

    @wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.running():
            return method(*args, **kwargs)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, method)


def _bytes(cache: Any) -> tuple[int, int]:
    """Bytes that a cache occupies, and bytes of its keys and values."""
    if not isinstance(cache, CompressedCache):
        occupied = sum(map(layer_bytes, cache.layers))
        return occupied, occupied
    return cache.nbytes, cache.report().entry_bytes
