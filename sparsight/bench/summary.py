"""Results of a benchmark as plain data: medians with their ranges, and ratios within each round."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sparsight.bench.benchmark import KEPT_LENGTH, KVPRESS, TRANSFORMERS, Case
from sparsight.bench.measure import Sample

Quantity = Callable[[Sample], float]
TIMES: dict[str, Quantity] = {
    "first_token": lambda sample: sample.first_token,
    "token": lambda sample: sample.token,
    "end_to_end": lambda sample: sample.end_to_end,
}
"""Times that are compared with those of the references."""


def summarize(measured: Sequence[Sequence[Case]], new_tokens: int, weights: int, free: int) -> list[dict[str, Any]]:
    """The results of every case.

    ``seconds`` of each stage are ``median``, ``low`` and ``high`` over the rounds. Ratios are medians over the rounds:

    - ``of_full``: times and bytes over those of plain transformers.
    - ``of_kvpress``: times and bytes over those of kvpress at the same budget.
    - ``of_kept_length``: time per token over that of plain transformers with a prompt of only the kept length.
    - ``of_limit``: time per token over ``token_limit``, the time to read the weights and the entries held at the
      round's copy bandwidth.

    Ratios without a reference are None, as are stages that a library does not measure. A case that was not measured has
    its ``reason`` and no results.

    Args:
        measured: the cases of each size.
        new_tokens: tokens per answer.
        weights: bytes of the weights that a decode step reads.
        free: bytes of memory beside the weights.
    """
    return [_case(case, size, new_tokens, weights, free) for size in measured for case in size]


def _case(case: Case, size: Sequence[Case], new_tokens: int, weights: int, free: int) -> dict[str, Any]:
    about = {
        "context": case.context,
        "batch": case.batch,
        "method": case.method,
        "budget": case.budget,
        "prompt_tokens": case.prompt_tokens,
        "reason": case.reason,
    }
    if case.reason is not None:
        return about
    samples = case.samples
    full, kept, kvpress = (
        next((other for other in size if (other.method, other.budget) == (name, budget)), None)
        for name, budget in ((TRANSFORMERS, 1.0), (KEPT_LENGTH, case.budget), (KVPRESS, case.budget))
    )
    limits = [(weights + samples[0].entry_bytes) / bandwidth for bandwidth in case.bandwidths]
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return {
        **about,
        "seconds": {
            **{name: _range([quantity(sample) for sample in samples]) for name, quantity in TIMES.items()},
            "statistics": _range([sample.statistics for sample in samples]),
            "compaction": _range([sample.compaction for sample in samples]),
        },
        "tokens_per_second": case.batch * new_tokens / _median(TIMES["end_to_end"], samples),
        "bytes_held": samples[0].bytes_held,
        "entry_bytes": samples[0].entry_bytes,
        "peak_bytes": max(peaks, default=None),
        "batch_that_fits": free * case.batch // samples[0].bytes_held,
        "of_full": _ratios(case, full),
        "of_kvpress": _ratios(case, kvpress),
        "of_kept_length": _ratio(case, kept, TIMES["token"]),
        "token_limit": _range(limits),
        "of_limit": statistics.median(sample.token / limit for sample, limit in zip(samples, limits, strict=True)),
        "copy_bandwidth": _range(case.bandwidths),
    }


def _ratios(case: Case, reference: Case | None) -> dict[str, float | None]:
    return {name: _ratio(case, reference, quantity) for name, quantity in (TIMES | {"bytes": _bytes_held}).items()}


def _ratio(case: Case, reference: Case | None, quantity: Quantity) -> float | None:
    """Median over the rounds of the ratio to the reference; None without a reference."""
    if reference is None or reference.reason is not None:
        return None
    pairs = zip(case.samples, reference.samples, strict=True)
    return statistics.median(quantity(sample) / quantity(other) for sample, other in pairs)


def _median(quantity: Quantity, samples: Sequence[Sample]) -> float:
    return statistics.median(quantity(sample) for sample in samples)


def _range(values: Sequence[float | None]) -> dict[str, float] | None:
    seconds = [each for each in values if each is not None]
    if not seconds:
        return None
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


def _bytes_held(sample: Sample) -> float:
    return sample.bytes_held
