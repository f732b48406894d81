"""The results of a run as plain data: medians with their spread, and ratios taken within each round."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sparsight.bench.measure import Sample
from sparsight.bench.rounds import KEPT_LENGTH, KVPRESS, TRANSFORMERS, Cell

Take = Callable[[Sample], float]
TIMES: dict[str, Take] = {
    "first_token": lambda sample: sample.first_token,
    "token": lambda sample: sample.token,
    "end_to_end": lambda sample: sample.end_to_end,
}
"""What is compared with plain transformers."""


def results(measured: Sequence[Sequence[Cell]], new_tokens: int, weights: int, room: int) -> list[dict[str, Any]]:
    """What was found of every cell.

    ``seconds`` of each stage are ``median``, ``low`` and ``high`` over the rounds. ``of_full`` are its times and bytes
    over those of plain transformers, ``of_kvpress`` over those of kvpress at the same budget, ``of_kept_length`` its
    time for a token over that of plain transformers given a prompt of the kept length, ``of_limit`` over the limit,
    ``token_limit``: the time that the round's copy bandwidth takes for the weights and the entries held. Where there
    is nothing to compare with they are None, as are stages that are not told apart. A cell that could not be measured
    has its ``reason`` and nothing else.

    Args:
        measured: the cells of each size.
        new_tokens: tokens of an answer.
        weights: bytes of the weights that a decode step reads.
        room: bytes of memory that the weights leave.
    """
    return [_cell(cell, size, new_tokens, weights, room) for size in measured for cell in size]


def _cell(cell: Cell, size: Sequence[Cell], new_tokens: int, weights: int, room: int) -> dict[str, Any]:
    about = {
        "context": cell.context,
        "batch": cell.batch,
        "method": cell.method,
        "budget": cell.budget,
        "prompt_tokens": cell.prompt_tokens,
        "reason": cell.reason,
    }
    if cell.reason is not None:
        return about
    samples = cell.samples
    full, kept, kvpress = (
        next((other for other in size if (other.method, other.budget) == (name, budget)), None)
        for name, budget in ((TRANSFORMERS, 1.0), (KEPT_LENGTH, cell.budget), (KVPRESS, cell.budget))
    )
    limits = [(weights + samples[0].entry_bytes) / bandwidth for bandwidth in cell.bandwidths]
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return {
        **about,
        "seconds": {
            **{name: _spread([take(sample) for sample in samples]) for name, take in TIMES.items()},
            "statistics": _spread([sample.statistics for sample in samples]),
            "compaction": _spread([sample.compaction for sample in samples]),
        },
        "tokens_per_second": cell.batch * new_tokens / _median(TIMES["end_to_end"], samples),
        "bytes_held": samples[0].bytes_held,
        "entry_bytes": samples[0].entry_bytes,
        "peak_bytes": max(peaks, default=None),
        "batch_that_fits": room * cell.batch // samples[0].bytes_held,
        "of_full": _ratios(cell, full),
        "of_kvpress": _ratios(cell, kvpress),
        "of_kept_length": _ratio(cell, kept, TIMES["token"]),
        "token_limit": _spread(limits),
        "of_limit": statistics.median(sample.token / limit for sample, limit in zip(samples, limits, strict=True)),
        "copy_bandwidth": _spread(cell.bandwidths),
    }


def _ratios(cell: Cell, reference: Cell | None) -> dict[str, float | None]:
    return {name: _ratio(cell, reference, take) for name, take in (TIMES | {"bytes": _bytes_held}).items()}


def _ratio(cell: Cell, reference: Cell | None, take: Take) -> float | None:
    """Median of the ratios within each round; None where there is no reference."""
    if reference is None or reference.reason is not None:
        return None
    pairs = zip(cell.samples, reference.samples, strict=True)
    return statistics.median(take(sample) / take(other) for sample, other in pairs)


def _median(take: Take, samples: Sequence[Sample]) -> float:
    return statistics.median(take(sample) for sample in samples)


def _spread(taken: Sequence[float | None]) -> dict[str, float] | None:
    seconds = [each for each in taken if each is not None]
    if not seconds:
        return None
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


def _bytes_held(sample: Sample) -> float:
    return sample.bytes_held
