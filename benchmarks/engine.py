"""What the engine costs one request, how many it runs in the same memory, and how long prompts delay running answers.

python -m benchmarks.engine --output benchmarks/results/engine-cpu.json
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from sparsight import CompressedCache, Engine, SamplingParams, load, recipe
from sparsight.bench import machine
from sparsight.bench.shapes import SHAPES, random_inputs, random_model

SHAPE, PROMPT_TOKENS, NEW_TOKENS = "small", 2900, 100
METHOD, BUDGET = "snapkv", 0.1
POOL_BYTES = 2**29
"""Memory for caches in which concurrent sequences are counted."""

CHUNK = 512
RUNNING = 4
"""Answers that run while prompts keep arriving."""


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the result.")],
    rounds: Annotated[int, typer.Option(help="Rounds of the comparison with model.generate.", min=2)] = 8,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Measure the engine on a model with random weights."""
    torch.set_num_threads(threads)
    model: Any = random_model(SHAPES[SHAPE], torch.device("cpu"), torch.float32)
    model.generation_config.eos_token_id = None
    processor = load()[1]
    inputs = random_inputs(model, PROMPT_TOKENS, 1)
    result = {
        "command": "python -m benchmarks.engine " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(model.device),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": SHAPE,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "method": METHOD,
        "budget": BUDGET,
        "alone": alone(model, processor, inputs, rounds),
        "concurrent": concurrent(model, processor, inputs),
        "gaps": gaps(model, processor, inputs),
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def alone(model: Any, processor: Any, inputs: Any, rounds: int) -> dict[str, Any]:
    """Seconds of one request on the engine, and of ``model.generate`` with the same cache, interleaved."""
    tokens = {"input_ids": inputs["input_ids"]}

    def on_engine() -> None:
        with engine(model, processor, prefill_chunk=None) as running:
            running.add(inputs=inputs, params=SamplingParams(max_new_tokens=NEW_TOKENS)).wait()

    def with_generate() -> None:
        cache = CompressedCache(model, recipe(METHOD, budget=BUDGET), inputs)
        model.generate(**tokens, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)

    pairs = [(seconds(on_engine), seconds(with_generate)) for _ in range(rounds + 1)][1:]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "engine_seconds": statistics.median(ours for ours, _ in pairs),
        "generate_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def concurrent(model: Any, processor: Any, inputs: Any) -> dict[str, int]:
    """Most answers that run at the same time within :data:`POOL_BYTES`, by method."""
    most = {}
    for name, chosen in (("full", recipe("full")), (METHOD, recipe(METHOD, budget=BUDGET))):
        with Engine(model, processor, chosen, kv_memory=POOL_BYTES, max_running=1000, prefill_chunk=None) as running:
            for _ in range(NEW_TOKENS):
                running.add(inputs=inputs, params=SamplingParams(max_new_tokens=NEW_TOKENS))
            most[name] = 0
            # No answer ends before as many steps; each takes up one request, as long as there is memory.
            for _ in range(NEW_TOKENS - 1):
                running.step()
                most[name] = max(most[name], running.running)
    return most


def gaps(model: Any, processor: Any, inputs: Any) -> dict[str, float]:
    """Milliseconds between tokens of running answers while prompts of the same length keep arriving in chunks."""
    params = SamplingParams(max_new_tokens=10**4)
    with engine(model, processor, prefill_chunk=CHUNK) as running:
        for _ in range(RUNNING):
            running.add(inputs=inputs, params=params)
        while running.running < RUNNING:
            running.step()
        decode = [seconds(running.step) for _ in range(40)]
        for _ in range(6):
            running.add(inputs=inputs, params=SamplingParams(max_new_tokens=1))
        busy: list[float] = []
        while running.waiting or len(busy) < 6 * PROMPT_TOKENS // CHUNK:
            busy.append(seconds(running.step))
    with engine(model, processor, prefill_chunk=CHUNK) as running:
        running.add(inputs=inputs, params=SamplingParams(max_new_tokens=1))
        chunks: list[float] = []
        while running.busy:
            chunks.append(seconds(running.step))
    one = max(chunks) + statistics.median(decode)
    worst = statistics.quantiles(busy, n=100)[98]
    return {
        "decode_step_ms": 1000 * statistics.median(decode),
        "longest_chunk_ms": 1000 * max(chunks),
        "p99_gap_ms": 1000 * worst,
        "ratio_to_chunk_and_step": worst / one,
    }


def engine(model: Any, processor: Any, prefill_chunk: int | None) -> Engine:
    """An engine with the method that is measured."""
    chosen = recipe(METHOD, budget=BUDGET)
    return Engine(model, processor, chosen, kv_memory=2**31, prefill_chunk=prefill_chunk)


def seconds(call: Callable[[], object]) -> float:
    """Time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
