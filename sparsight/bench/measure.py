"""One prompt answered in one way: how long each stage takes, and what it holds."""

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
from sparsight.engine.model_runner import capture_options, decode_step


@dataclass(frozen=True)
class Sample:
    """What one answer took.

    Attributes:
        first_token: seconds until the first token, ``statistics`` and ``compaction`` included.
        statistics: seconds of observing the queries, None where another library does not tell them apart.
        compaction: seconds of planning, and of copying what stays, likewise.
        token: seconds of one further token, the median.
        end_to_end: seconds of all tokens.
        bytes_held: bytes of the cache after the prefill, room to grow included.
        entry_bytes: bytes of the keys and values in it, which a decode step reads.
        peak_bytes: highest use of memory, None where the machine does not tell it.
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
    """Answer prompts ``[B, T]`` with ``new_tokens`` tokens each, the likeliest ones, through an empty cache."""
    device = model.device
    gc.collect()
    peak_known = machine.reset_peak(device)
    observing, compacting = Stopwatch(device), Stopwatch(device)
    with _watched(Prefill, "observe", observing), _watched(CompressedCache, "_compact", compacting):
        first_token, token = _step(model, device, input_ids, cache)
    held, entries = _bytes(cache)
    seconds = []
    # As sparsight.generate does.
    decode: Callable[..., Any] = decode_step(model) if capture_options(cache) else model
    for _ in range(new_tokens - 1):
        taken, token = _step(decode, device, token, cache)
        seconds.append(taken)
    return Sample(
        first_token,
        observing.seconds(),
        compacting.seconds(),
        statistics.median(seconds),
        first_token + sum(seconds),
        held,
        entries,
        machine.peak_bytes(device) if peak_known else None,
    )


def _step(model: Callable[..., Any], device: torch.device, tokens: Tensor, cache: Cache) -> tuple[float, Tensor]:
    """Seconds of one pass through the model, and the next token of each sequence ``[B, 1]``."""
    machine.synchronize(device)
    start = time.perf_counter()
    token = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    machine.synchronize(device)
    return time.perf_counter() - start, token


@contextmanager
def _watched(owner: type, name: str, watch: Stopwatch) -> Iterator[None]:
    """Let a watch run during every call of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    @wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with watch.running():
            return method(*args, **kwargs)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, method)


def _bytes(cache: Any) -> tuple[int, int]:
    """Bytes that a cache occupies, and of them those of keys and values."""
    if not isinstance(cache, CompressedCache):
        held = sum(map(layer_bytes, cache.layers))
        return held, held
    stores = [layer.store for layer in cache.compressed if layer.store is not None]
    others = cache.nbytes - sum(layer.nbytes for layer in cache.compressed)
    return cache.nbytes, others + sum(int(store.held.sum()) * store.token_bytes // len(store.held) for store in stores)
