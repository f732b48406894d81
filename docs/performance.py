"""The measured part of performance.md, from benchmarks/results: ``python -m docs.performance`` rewrites it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.tables import put, table
from sparsight.bench.rounds import OTHERS, TRANSFORMERS
from sparsight.bench.speed_plots import tokens
from sparsight.bench.tables import name_of, number

PAGE = Path(__file__).parent / "performance.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results"
KERNELS = "kernels-gpu.json"
BUDGET = 0.1
NOT_MEASURED = "not yet measured"

Cell = Mapping[str, Any]
Run = Mapping[str, Any]
Take = Callable[[Sequence[Cell]], str]
SIZE = ("prompt", "batch", "")
TIMES = [
    *SIZE,
    "first token, ms",
    "x",
    "a token, ms",
    "x",
    "x kept length",
    "x limit",
    "x kvpress",
    "end to end, ms",
    "x",
]
COSTS = [*SIZE, "statistics, ms", "compaction, ms", "KV held, MiB", "x", "peak, MiB", "tokens / s", "batch that fits"]
DEVICES = ("cpu", "cuda")


def written(page: str, results: Path = RESULTS) -> str:
    """The page with its measured part as the results say."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/bench.json"))}
    kernels = json.loads((results / KERNELS).read_text()) if (results / KERNELS).exists() else {}
    parts = [targets(list(runs.values()), kernels), *(part for name, run in runs.items() for part in of_run(name, run))]
    if kernels.get("decode"):
        parts += of_kernels(kernels)
    return put(page, "bench", "make performance", "\n" + "\n\n".join(parts) + "\n")


def targets(runs: Sequence[Run], kernels: Mapping[str, Any]) -> str:
    """What is aimed at, and the range of what was measured, over all runs on CPUs and on GPUs."""
    cpu, gpu = ([cell for run in runs if run["device"] == device for cell in measured(run)] for device in DEVICES)
    rows = [
        [name, on_cpu, take(cpu) if on_cpu else "", on_gpu, take(gpu) if on_gpu else ""]
        for name, on_cpu, on_gpu, take in TARGETS
    ]
    copies = [case["of_bandwidth"] for case in kernels.get("decode", []) if case["reason"] is None]
    best_kernel = f"{max(copies):.0%}" if copies else NOT_MEASURED
    rows.append(["ragged decode kernel, of the copy bandwidth, best", "", "", "at least 80 %", best_kernel])
    return "### Targets\n\n" + table(["at a budget of 10 %", "CPU", "measured", "GPU", "measured"], rows)


def measured(run: Run) -> Iterator[Cell]:
    """Methods at the budget of the targets, and plain transformers."""
    for cell in run["cells"]:
        if cell["reason"] is None and (cell["budget"] == BUDGET or cell["method"] == TRANSFORMERS):
            yield cell


def overhead(method: str) -> Take:
    """How much longer a method's first token takes than plain transformers', for prompts of at least 2,900 tokens."""
    return between(
        lambda cell: (
            100 * (cell["of_full"]["first_token"] - 1)
            if cell["method"] == method and cell["context"] >= 2900 and cell["of_full"]["first_token"] is not None
            else None
        ),
        ".1f",
        " %",
    )


def kvpress(stage: str) -> Take:
    """A time of SnapKV's over that of kvpress's SnapKV."""
    return between(lambda cell: cell["of_kvpress"][stage] if cell["method"] == "snapkv" else None, ".3f", " x")


def best(stage: str) -> Take:
    """The largest speed-up over the full cache, and whose it is."""

    def take(cells: Sequence[Cell]) -> str:
        found = [cell for cell in cells if cell["method"] not in OTHERS and cell["of_full"][stage] is not None]
        if not found:
            return NOT_MEASURED
        cell = min(found, key=lambda cell: cell["of_full"][stage])
        size = f"{cell['method']}, {cell['batch']} of {tokens(cell['context'])}"
        return f"{1 / cell['of_full'][stage]:.2f} x ({size})"

    return take


def more_fit(cell: Cell) -> float | None:
    """Sequences of 8k tokens that fit over those of plain transformers: as one's bytes are to the other's."""
    of_full = cell["of_full"]["bytes"]
    return None if cell["context"] != 8192 or of_full is None else 1 / of_full


def between(take: Callable[[Cell], float | None], digits: str, unit: str) -> Take:
    """Lowest and highest of what there is of methods."""

    def taken(cells: Sequence[Cell]) -> str:
        values = [value for cell in cells if cell["method"] not in OTHERS and (value := take(cell)) is not None]
        if not values:
            return NOT_MEASURED
        ends = dict.fromkeys(format(end, digits) for end in (min(values), max(values)))
        return " to ".join(ends) + unit

    return taken


TARGETS: list[tuple[str, str, str, Take]] = [
    ("prefill overhead, VL-Cache, from 2,900 tokens on", "at most 2 %", "at most 2 %", overhead("vl-cache")),
    ("prefill overhead, Elastic Cache, likewise", "at most 25 %", "at most 15 %", overhead("elastic")),
    (
        "a token over plain transformers' with a prompt of the kept length",
        "at most 1.02 x",
        "at most 1.02 x",
        between(lambda cell: cell["of_kept_length"], ".3f", " x"),
    ),
    ("a token over the byte limit", "at most 1.5 x", "", between(lambda cell: cell["of_limit"], ".3f", " x")),
    (
        "the same with 16 prompts and more",
        "",
        "at most 1.3 x",
        between(lambda cell: cell["of_limit"] if cell["batch"] >= 16 else None, ".3f", " x"),
    ),
    ("SnapKV's token over kvpress's", "below 1 x", "below 1 x", kvpress("token")),
    ("SnapKV's first token over kvpress's", "below 1 x", "below 1 x", kvpress("first_token")),
    ("decoding, speed-up over the full cache, best", "", "at least 8 x", best("token")),
    ("end to end, speed-up over the full cache, best", "", "at least 2.5 x", best("end_to_end")),
    ("sequences of 8k tokens that fit, over the full cache's", "", "at least 8 x", between(more_fit, ".1f", " x")),
]
"""What, the targets on a CPU and on a GPU, and what is read from the cells."""


def of_run(name: str, run: Run) -> Iterator[str]:
    """A run's heading, what it was, its tables, and its pictures if it has several contexts."""
    threads = f", {run['threads']} thread{'s' * (run['threads'] > 1)}" if run["device"] == "cpu" else ""
    yield f"### {run['model']}, {run['dtype']}, {run['machine']}{threads}"
    versions = f"torch {run['torch']}, transformers {run['transformers']}"
    if "kvpress" in run:
        versions += f", kvpress {run['kvpress']['kvpress']} on transformers {run['kvpress']['transformers']}"
    yield (
        f"{run['date']}, {versions}; {run['new_tokens']} tokens, rounds: {run['rounds']}; medians, lowest to highest "
        f"in brackets; x is of plain transformers' time in the same round. `{run['command']}`"
    )
    yield table(
        TIMES,
        [times_row(cell) for cell in run["cells"]],
    )
    yield table(
        COSTS,
        [costs_row(cell) for cell in run["cells"] if cell["reason"] is None],
    )
    if len({cell["context"] for cell in run["cells"] if cell["reason"] is None}) > 1:
        for picture, title in (("speed-up", "Speed-up by context"), ("growth", "Costs by context")):
            yield f"![{title}](../{RESULTS.parent.name}/{RESULTS.name}/{name}/{picture}.png)"


def times_row(cell: Cell) -> list[str]:
    """A cell's times and what they are compared with."""
    sizes = [tokens(cell["context"]), str(cell["batch"]), name_of(cell)]
    if cell["reason"] is not None:
        return [*sizes, cell["reason"], *[""] * 8]
    of_full = cell["of_full"]
    return [
        *sizes,
        spread(cell["seconds"]["first_token"]),
        ratio(of_full["first_token"]),
        spread(cell["seconds"]["token"]),
        *map(ratio, (of_full["token"], cell["of_kept_length"], cell["of_limit"], cell["of_kvpress"]["token"])),
        spread(cell["seconds"]["end_to_end"]),
        ratio(of_full["end_to_end"]),
    ]


def costs_row(cell: Cell) -> list[str]:
    """What compression costs a cell, and memory."""
    stages = [cell["seconds"][stage] for stage in ("statistics", "compaction")]
    return [
        tokens(cell["context"]),
        str(cell["batch"]),
        name_of(cell),
        *("" if each is None else number(each["median"] * 1e3) for each in stages),
        mebibytes(cell["bytes_held"]),
        ratio(cell["of_full"]["bytes"]),
        "" if cell["peak_bytes"] is None else mebibytes(cell["peak_bytes"]),
        number(cell["tokens_per_second"]),
        f"{cell['batch_that_fits']:,}",
    ]


def of_kernels(kernels: Mapping[str, Any]) -> Iterator[str]:
    """The kernels' own measurements."""
    yield f"### Kernels, bfloat16, {kernels['machine']}"
    yield f"{kernels['date']}, torch {kernels['torch']}. `{kernels['command']}`"
    rows = []
    for case in kernels["decode"]:
        sizes = [case["shape"], tokens(case["context"]), str(case["batch"])]
        if case["reason"] is not None:
            rows.append([*sizes, case["reason"], "", ""])
            continue
        speed = case["bytes"] / case["kernel_seconds"] / 1e9
        rows.append([*sizes, number(speed), f"{case['of_bandwidth']:.0%}", f"{case['launches_per_layer']:g}"])
    header = ["ragged decode", "prompt", "batch", "GB / s", "of the copy bandwidth", "launches a layer"]
    yield table(header, rows)
    layers = kernels["launches"][0]["layers"]
    yield table(
        [f"launches, {layers} layers", "prefill", "a token", "replayed"],
        [
            [row["method"], *(str(row.get(stage, "")) for stage in ("prefill", "decode", "replayed"))]
            for row in kernels["launches"]
        ],
    )


def spread(seconds: Mapping[str, float]) -> str:
    """Median, lowest and highest in milliseconds."""
    median, low, high = (number(seconds[name] * 1e3) for name in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def ratio(value: float | None) -> str:
    """A ratio, if there is one."""
    return "" if value is None else f"{value:.3f}"


def mebibytes(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.1f}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
