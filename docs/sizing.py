"""The estimate in docs/scale.md, from the results of `make bench-batch`; ``python -m docs.sizing`` writes it."""

import json
import math
from pathlib import Path
from typing import Any

from docs.tables import replace_part, table

PAGE = Path(__file__).parent / "scale.md"
RESULT = Path(__file__).parents[1] / "benchmarks/results/batch-cpu.json"
PART, COMMAND = "sizing", "make bench-batch"
IMAGES = 100_000_000
DAYS = (1, 7, 30)


def sizing(result: dict[str, Any]) -> str:
    """The estimate as Markdown, from a result of ``python -m benchmarks.batch measure``."""
    measured = table(
        ["one replica, measured", "rows a second", "private memory, peak"],
        [[name, f"{case['rows_per_second']:.2f}", _memory(case, 1)] for name, case in result["cases"].items()],
    )
    rows = [
        [name, *(f"{_replicas(case, days):,} ({_memory(case, _replicas(case, days))})" for days in DAYS)]
        for name, case in result["cases"].items()
    ]
    done = ["1 day" if days == 1 else f"{days} days" for days in DAYS]
    needed = table([f"replicas for {IMAGES:,} images, estimated", *done], rows)
    machine = f"{result['machine']}, {result['threads']} threads, torch {result['torch']}"
    return (
        f"Measured on {result['date']}: {result['pages']:,} pages, {result['new_tokens']} new tokens each, by the "
        f"model that ships, on one machine ({machine}), {result['method']} at {result['budget']:.0%}; the loop at its "
        f"best batch size, {result['loop_batch_size']}.\n\n{measured}\n\n{needed}"
    )


def _replicas(case: dict[str, Any], days: int) -> int:
    """Replicas of a case that answer all images within a number of days."""
    return math.ceil(IMAGES / (case["rows_per_second"] * days * 86400))


def _memory(case: dict[str, Any], replicas: int) -> str:
    """Peak private memory of a number of replicas, processes that open images included."""
    gibibytes = case["peak_bytes_with_children"] * replicas / 2**30
    return f"{gibibytes:,.{2 if gibibytes < 10 else 0}f} GiB"


if __name__ == "__main__":
    PAGE.write_text(replace_part(PAGE.read_text(), PART, COMMAND, sizing(json.loads(RESULT.read_text()))))
