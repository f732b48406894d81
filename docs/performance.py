"""The measured part of performance.md, from benchmarks/results; ``python -m docs.performance`` writes it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.tables import replace_part, table
from sparsight.bench.benchmark import REFERENCES, TRANSFORMERS
from sparsight.bench.speed_plots import tokens
from sparsight.bench.tables import name_of, number

PAGE = Path(__file__).parent / "performance.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results"
KERNELS = "kernels-gpu.json"
PREFILL = "small-cpu-prefill"
"""The run that compares the prefills of all methods."""

BUDGET = 0.1
NOT_MEASURED = "not yet measured"

CaseResult = Mapping[str, Any]
Run = Mapping[str, Any]
Measured = Callable[[Sequence[CaseResult]], str]
SIZE = ("prompt tokens", "batch", "method")
VS_TRANSFORMERS = "vs transformers"
TIMES = [
    *SIZE,
    "first token, ms",
    VS_TRANSFORMERS,
    "per token, ms",
    VS_TRANSFORMERS,
    "vs short prompt",
    "vs bandwidth",
    "vs kvpress",
    "end to end, ms",
    VS_TRANSFORMERS,
]
COSTS = [
    *SIZE,
    "statistics, ms",
    "compaction, ms",
    "KV cache, MiB",
    "vs full cache",
    "peak memory, MiB",
    "tokens per second",
    "largest batch",
]
DEVICES = ("cpu", "cuda")


def with_results(page: str, results: Path = RESULTS) -> str:
    """The page with its measured part replaced."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/bench.json"))}
    prefill = runs.pop(PREFILL, None)
    kernels = json.loads((results / KERNELS).read_text()) if (results / KERNELS).exists() else {}
    parts = [targets(list(runs.values()), kernels), *(part for name, run in runs.items() for part in of_run(name, run))]
    if prefill is not None:
        parts += of_prefills(prefill)
    if kernels.get("decode"):
        parts += of_kernels(kernels)
    return replace_part(page, "bench", "make performance", "\n" + "\n\n".join(parts) + "\n")


def targets(runs: Sequence[Run], kernels: Mapping[str, Any]) -> str:
    """The targets and the measured ranges over all runs on CPUs and on GPUs."""
    cpu, gpu = ([case for run in runs if run["device"] == device for case in measured(run)] for device in DEVICES)
    rows = [
        [name, on_cpu, measure(cpu) if on_cpu else "", on_gpu, measure(gpu) if on_gpu else ""]
        for name, on_cpu, on_gpu, measure in TARGETS
    ]
    copies = [case["of_bandwidth"] for case in kernels.get("decode", []) if case["reason"] is None]
    best_kernel = f"{max(copies):.0%}" if copies else NOT_MEASURED
    rows.append(["ragged decode kernel, best share of the copy bandwidth", "", "", "at least 80 %", best_kernel])
    return "### Targets\n\n" + table(["at a budget of 10 %", "CPU", "measured", "GPU", "measured"], rows)


def measured(run: Run) -> Iterator[CaseResult]:
    """Results of methods at the targets' budget, and of plain transformers."""
    for case in run["cells"]:
        if case["reason"] is None and (case["budget"] == BUDGET or case["method"] == TRANSFORMERS):
            yield case


def overhead(method: str) -> Measured:
    """Time to a method's first token above plain transformers', for prompts of at least 2,900 tokens."""
    return value_range(
        lambda case: (
            100 * (case["of_full"]["first_token"] - 1)
            if case["method"] == method and case["context"] >= 2900 and case["of_full"]["first_token"] is not None
            else None
        ),
        ".1f",
        " %",
    )


def kvpress(stage: str) -> Measured:
    """SnapKV's time over that of kvpress's SnapKV."""
    return value_range(lambda case: case["of_kvpress"][stage] if case["method"] == "snapkv" else None, ".3f", " x")


def best(stage: str) -> Measured:
    """The largest speed-up over the full cache, with its method and size."""

    def measure(cases: Sequence[CaseResult]) -> str:
        found = [case for case in cases if case["method"] not in REFERENCES and case["of_full"][stage] is not None]
        if not found:
            return NOT_MEASURED
        case = min(found, key=lambda case: case["of_full"][stage])
        size = f"{case['method']}, {case['batch']} of {tokens(case['context'])}"
        return f"{1 / case['of_full'][stage]:.2f} x ({size})"

    return measure


def more_fit(case: CaseResult) -> float | None:
    """Sequences of 8k tokens that fit, relative to plain transformers: the inverse ratio of bytes per sequence."""
    of_full = case["of_full"]["bytes"]
    return None if case["context"] != 8192 or of_full is None else 1 / of_full


def value_range(quantity: Callable[[CaseResult], float | None], digits: str, unit: str) -> Measured:
    """The lowest and highest value of the methods that have one."""

    def measure(cases: Sequence[CaseResult]) -> str:
        values = [value for case in cases if case["method"] not in REFERENCES and (value := quantity(case)) is not None]
        if not values:
            return NOT_MEASURED
        ends = dict.fromkeys(format(end, digits) for end in (min(values), max(values)))
        return " to ".join(ends) + unit

    return measure


TARGETS: list[tuple[str, str, str, Measured]] = [
    ("prefill overhead, VL-Cache, from 2,900 tokens on", "at most 2 %", "at most 2 %", overhead("vl-cache")),
    ("prefill overhead, Elastic Cache, from 2,900 tokens on", "at most 25 %", "at most 15 %", overhead("elastic")),
    (
        "time per token vs transformers with a prompt of the kept length",
        "at most 1.02 x",
        "at most 1.02 x",
        value_range(lambda case: case["of_kept_length"], ".3f", " x"),
    ),
    (
        "time per token vs the bandwidth limit",
        "at most 1.5 x",
        "",
        value_range(lambda case: case["of_limit"], ".3f", " x"),
    ),
    (
        "time per token vs the bandwidth limit, batch 16 and more",
        "",
        "at most 1.3 x",
        value_range(lambda case: case["of_limit"] if case["batch"] >= 16 else None, ".3f", " x"),
    ),
    ("SnapKV, time per token vs kvpress", "below 1 x", "below 1 x", kvpress("token")),
    ("SnapKV, time to the first token vs kvpress", "below 1 x", "below 1 x", kvpress("first_token")),
    ("decoding, best speed-up over the full cache", "", "at least 8 x", best("token")),
    ("end to end, best speed-up over the full cache", "", "at least 2.5 x", best("end_to_end")),
    ("sequences of 8k tokens that fit vs the full cache", "", "at least 8 x", value_range(more_fit, ".1f", " x")),
]
"""Quantity, targets on a CPU and on a GPU, and how the measured value is computed."""


def of_run(name: str, run: Run) -> Iterator[str]:
    """A run's heading, settings and tables, and its figures if it has several contexts."""
    threads = f", {run['threads']} thread{'s' * (run['threads'] > 1)}" if run["device"] == "cpu" else ""
    yield f"### {run['model']}, {run['dtype']}, {run['machine']}{threads}"
    versions = f"torch {run['torch']}, transformers {run['transformers']}"
    if "kvpress" in run:
        versions += f", kvpress {run['kvpress']['kvpress']} on transformers {run['kvpress']['transformers']}"
    yield (
        f"{run['date']}, {versions}; {run['new_tokens']} tokens, rounds: {run['rounds']}; medians with ranges in "
        "brackets, ratios within a round. Short prompt: transformers with a prompt of only the kept length. Bandwidth: "
        f"the time to read weights and KV entries at the bandwidth of a copy. `{run['command']}`"
    )
    yield table(
        TIMES,
        [times_row(case) for case in run["cells"]],
    )
    yield table(
        COSTS,
        [costs_row(case) for case in run["cells"] if case["reason"] is None],
    )
    if len({case["context"] for case in run["cells"] if case["reason"] is None}) > 1:
        for figure, title in (("speed-up", "Speed-up by context"), ("growth", "Costs by context")):
            yield f"![{title}](../{RESULTS.parent.name}/{RESULTS.name}/{name}/{figure}.png)"


def of_prefills(run: Run) -> Iterator[str]:
    """Time to the first token with each method."""
    yield f"### Prefill of every method, {run['model']}, {run['dtype']}, {run['machine']}, {run['threads']} thread"
    (context,) = {case["context"] for case in run["cells"]}
    yield (
        f"{run['date']}, torch {run['torch']}, transformers {run['transformers']}; prompts of {tokens(context)} "
        f"tokens, rounds: {run['rounds']}; medians with ranges in brackets, ratios within a round. `{run['command']}`"
    )
    header = ["method", "first token, ms", VS_TRANSFORMERS, "statistics, ms", "compaction, ms"]
    yield table(header, [prefill_row(case) for case in run["cells"]])
    yield "`sparsemm` is missing: its head scores are calibrated on one model, and these weights are random."


def prefill_row(case: CaseResult) -> list[str]:
    """A case's time to the first token, and what of it is statistics and compaction."""
    if case["reason"] is not None:
        return [name_of(case), case["reason"], "", "", ""]
    stages = [case["seconds"][stage] for stage in ("statistics", "compaction")]
    return [
        name_of(case),
        spread(case["seconds"]["first_token"]),
        ratio(case["of_full"]["first_token"]),
        *("" if each is None else number(each["median"] * 1e3) for each in stages),
    ]


def times_row(case: CaseResult) -> list[str]:
    """A case's times and ratios."""
    sizes = [tokens(case["context"]), str(case["batch"]), name_of(case)]
    if case["reason"] is not None:
        return [*sizes, case["reason"], *[""] * 8]
    of_full = case["of_full"]
    return [
        *sizes,
        spread(case["seconds"]["first_token"]),
        ratio(of_full["first_token"]),
        spread(case["seconds"]["token"]),
        *map(ratio, (of_full["token"], case["of_kept_length"], case["of_limit"], case["of_kvpress"]["token"])),
        spread(case["seconds"]["end_to_end"]),
        ratio(of_full["end_to_end"]),
    ]


def costs_row(case: CaseResult) -> list[str]:
    """A case's cost of compression, and memory."""
    stages = [case["seconds"][stage] for stage in ("statistics", "compaction")]
    return [
        tokens(case["context"]),
        str(case["batch"]),
        name_of(case),
        *("" if each is None else number(each["median"] * 1e3) for each in stages),
        mebibytes(case["bytes_held"]),
        ratio(case["of_full"]["bytes"]),
        "" if case["peak_bytes"] is None else mebibytes(case["peak_bytes"]),
        number(case["tokens_per_second"]),
        f"{case['batch_that_fits']:,}",
    ]


def of_kernels(kernels: Mapping[str, Any]) -> Iterator[str]:
    """The measurements of the kernels."""
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
    header = ["ragged decode", "prompt tokens", "batch", "GB/s", "share of copy bandwidth", "launches per layer"]
    yield table(header, rows)
    layers = kernels["launches"][0]["layers"]
    yield table(
        [f"launches, {layers} layers", "prefill", "per token", "per replayed token"],
        [
            [row["method"], *(str(row.get(stage, "")) for stage in ("prefill", "decode", "replayed"))]
            for row in kernels["launches"]
        ],
    )


def spread(seconds: Mapping[str, float]) -> str:
    """Median and range in milliseconds."""
    median, low, high = (number(seconds[name] * 1e3) for name in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def ratio(value: float | None) -> str:
    """A ratio; empty for None."""
    return "" if value is None else f"{value:.3f}"


def mebibytes(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.1f}"


if __name__ == "__main__":
    PAGE.write_text(with_results(PAGE.read_text()))
