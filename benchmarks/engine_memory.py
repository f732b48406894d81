"""Resident memory of an engine over many requests, a fifth of them aborted.

python -m benchmarks.engine_memory --output benchmarks/results/engine-memory-cpu.json
"""

import gc
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated, Any

import psutil
import torch
import transformers
import typer

from sparsight import Engine, SamplingParams, load
from sparsight.bench import machine

PROMPT_TOKENS, NEW_TOKENS = (20, 100), (1, 20)
"""Shortest and longest prompt and answer."""

METHODS = ("vl-cache", "adakv", "h2o", "full")
WAITING = 4
"""Requests that wait at most."""


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the result.")],
    requests: Annotated[int, typer.Option(help="Number of requests.", min=8)] = 2000,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Measure the model that ships, in float32 and in bfloat16."""
    torch.set_num_threads(threads)
    result = {
        "command": "python -m benchmarks.engine_memory " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(torch.device("cpu")),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "requests": requests,
        # Both in one process: what the first one leaves is the second one's beginning.
        **{dtype: serve(dtype, requests) for dtype in ("float32", "bfloat16")},
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def serve(dtype: str, requests: int) -> dict[str, Any]:
    """MiB of resident memory after each eighth of the requests, and whether the pool is empty in the end."""
    model, processor = load(dtype=dtype)
    model.generation_config.eos_token_id = None
    random, resident = Random(0), []
    with Engine(model, processor, kv_memory=2**28, max_running=64) as engine:
        for number in range(requests):
            ids = torch.tensor([[random.randrange(3, 200) for _ in range(random.randint(*PROMPT_TOKENS))]])
            params = SamplingParams(max_new_tokens=random.randint(*NEW_TOKENS))
            handle = engine.add(inputs={"input_ids": ids}, recipe=random.choice(METHODS), params=params)
            engine.step()
            if number % 5 == 0:
                engine.abort(handle)
            while engine.waiting > WAITING:
                engine.step()
            if (number + 1) % (requests // 8) == 0:
                gc.collect()
                resident.append(round(psutil.Process().memory_info().rss / 2**20))
        engine.run()
        pool = engine._batch.pool
        return {"resident_mib": resident, "pool_empty": pool is not None and pool.free_slots == pool.slots}


if __name__ == "__main__":
    typer.run(main)
