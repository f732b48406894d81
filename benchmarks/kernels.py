"""The decode kernel's share of the copy bandwidth, and kernel launches of prefill and decoding, on an NVIDIA GPU.

KV heads have different numbers of entries. Each layer has storage of its own, as in decoding, so that the GPU's caches
do not contain what the next call reads.

    python -m benchmarks.kernels --output benchmarks/results/kernels-gpu.json
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from sparsight.bench import machine
from sparsight.bench.shapes import SHAPES, random_inputs, random_model
from sparsight.cache import CompressedCache
from sparsight.cache.ragged_store import RaggedStore
from sparsight.engine.model_runner import ModelRunner
from sparsight.methods import recipe
from sparsight.utils import memory

MODELS = ("llava-1.5-7b", "llava-next-mistral-7b")
CONTEXTS, BATCHES, BUDGET = (2048, 8192, 32768), (1, 4, 16, 64), 0.1
METHODS = ("full", "vl-cache", "elastic", "snapkv", "adakv")
PROMPT = 2900
ROUNDS = 5
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
"""Prefixes of the calls with which the CPU launches work on the GPU."""


def main(output: Annotated[Path, typer.Option(help="JSON file for the result.")]) -> None:
    """Measure the kernels; without a GPU the result says so."""
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": "python -m benchmarks.kernels " + " ".join(sys.argv[1:]), "torch": torch.__version__}
    if not torch.cuda.is_available():
        about["reason"] = "not measured: there is no NVIDIA GPU"
        output.write_text(json.dumps(about, indent=1) + "\n")
        print(f"The kernels were {about['reason']}.")
        return
    found = about | measured(torch.device("cuda"))
    output.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


@torch.inference_mode()
def measured(device: torch.device) -> dict[str, Any]:
    """The decode kernel at every size, and launch counts."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(device),
        "decode": [decode_case(*case, device) for case in product(MODELS, CONTEXTS, BATCHES)],
        "launches": launch_counts(device),
    }


def decode_case(shape: str, context: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Attention of one token in every layer of a shape, with entries for a tenth of the context on average."""
    config = SHAPES[shape]
    size = config.hidden_size // config.num_attention_heads
    held = lengths(round(BUDGET * context), batch * config.num_key_value_heads)
    about = {"shape": shape, "context": context, "batch": batch, "reason": None}
    # With a margin for unused capacity.
    if 1.2 * config.num_hidden_layers * sum(held) * 2 * size * 2 > memory.available_bytes(device):
        return {**about, "reason": "does not fit"}
    like = torch.empty(batch, config.num_key_value_heads, 0, size, dtype=torch.bfloat16, device=device)
    layers = [random_store(held, like) for _ in range(config.num_hidden_layers)]
    query = torch.randn(batch, config.num_attention_heads, 1, size, dtype=torch.bfloat16, device=device)
    read = len(layers) * sum(held) * 2 * size * like.itemsize

    def attend() -> None:
        for layer in layers:
            layer.attend(query, None, None)

    attend()
    gpu_seconds, launched, total_seconds, bandwidths = [], 0, [], []
    for _ in range(ROUNDS):
        bandwidths.append(machine.copy_bandwidth(device))
        machine.synchronize(device)
        start = time.perf_counter()
        attend()
        machine.synchronize(device)
        total_seconds.append(time.perf_counter() - start)
        seconds, launched = profiled(attend)
        gpu_seconds.append(seconds)
    return {
        **about,
        "bytes": read,
        "kernel_seconds": statistics.median(gpu_seconds),
        "seconds": statistics.median(total_seconds),
        "launches_per_layer": launched / len(layers),
        "copy_bandwidth": max(bandwidths),
        "of_bandwidth": read / statistics.median(gpu_seconds) / max(bandwidths),
    }


def lengths(mean: int, count: int) -> list[int]:
    """``count`` lengths from 0.5 to 1.5 times the mean, in random order."""
    half = torch.linspace(0, mean // 2, (count + 1) // 2).round().int().tolist()
    both = [mean + sign * each for each in half for sign in (1, -1)][:count]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [both[place] for place in order]


def random_store(held: list[int], like: Tensor) -> RaggedStore:
    """Random entries, ``held[b * H_kv + h]`` for each sequence and KV head; ``like`` is ``[B, H_kv, 0, D]``."""
    entries = RaggedStore.allocate(held, like, like)
    entries.keys.normal_()
    entries.values.normal_()
    # Any valid positions will do.
    entries.flat_positions.zero_()
    return entries


def launch_counts(device: torch.device) -> list[dict[str, Any]]:
    """Launches of a prefill, of a decoded token, and of a token with a replayed CUDA graph."""
    model = random_model(SHAPES["small"], device, torch.bfloat16)
    inputs = random_inputs(model, PROMPT, 1)
    prompt, token = inputs["input_ids"], inputs["input_ids"][:, :1]
    found = []
    for method in (None, *METHODS):
        chosen = None if method is None else recipe(method, **({} if method == "full" else {"budget": BUDGET}))
        counts = {}
        for _ in range(2):
            # Kernels are compiled in the first pass.
            cache: Any = CompressedCache(model, chosen, inputs) if chosen else DynamicCache(config=model.config)
            for stage, tokens in (("prefill", prompt), ("decode", token)):
                _, counts[stage] = profiled(partial(model, input_ids=tokens, past_key_values=cache, logits_to_keep=1))
        if chosen:
            cache = CompressedCache(model, chosen, inputs, max_new_tokens=3)
            model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
            step = ModelRunner(model)
            for _ in range(3):
                _, counts["replayed"] = profiled(
                    partial(step, input_ids=token, past_key_values=cache, logits_to_keep=1)
                )
        found.append({"method": method or "transformers", "layers": model.config.num_hidden_layers, **counts})
    return found


def profiled(work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds that the GPU is busy with some work, and the number of launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return totals(profiler.events())


def totals(events: Iterable[Any]) -> tuple[float, int]:
    """Seconds of work on the GPU and the number of launches in a profiler's events."""
    events = list(events)
    seconds = sum(each.time_range.elapsed_us() for each in events if each.device_type.name == "CUDA") / 1e6
    return seconds, sum(each.name.startswith(LAUNCHES) for each in events if each.device_type.name == "CPU")


def show(found: dict[str, Any]) -> None:
    """Print the results as two tables."""
    table = Table(title=f"Ragged decode kernel, {found['machine']}, bfloat16, {BUDGET:.0%} of the context")
    for column in (
        "shape",
        "context",
        "batch",
        "us per layer",
        "with launches",
        "GB/s",
        "of copy bandwidth",
        "launches per layer",
    ):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for case in found["decode"]:
        sizes = [case["shape"], str(case["context"]), str(case["batch"])]
        if case["reason"]:
            table.add_row(*sizes, case["reason"])
            continue
        layers = SHAPES[case["shape"]].num_hidden_layers
        times = [f"{case[name] / layers * 1e6:.1f}" for name in ("kernel_seconds", "seconds")]
        speed = f"{case['bytes'] / case['kernel_seconds'] / 1e9:,.0f}"
        table.add_row(*sizes, *times, speed, f"{case['of_bandwidth']:.1%}", f"{case['launches_per_layer']:g}")
    launches = Table(title=f"Launches, {found['launches'][0]['layers']} layers, {PROMPT} tokens")
    for column in ("", "prefill", "per token", "per replayed token"):
        launches.add_column(column, justify="right" if column else "left")
    for row in found["launches"]:
        launches.add_row(row["method"], *(str(row.get(stage, "")) for stage in ("prefill", "decode", "replayed")))
    Console().print(table, launches)


if __name__ == "__main__":
    typer.run(main)
