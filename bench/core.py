"""What compression costs at prefill and gains at decoding, against plain transformers on the same random model.

Cases run in turns, so that a machine whose speed drifts slows all of them; ratios are taken within a round.

    python -m bench.core --threads 1 --output bench/results/core-cpu-1-thread.json
"""

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsight import CompressedCache, ElasticCache, VLCache

POST_VISION_TOKENS = 64
FIRST_TEXT_TOKENS = 36


@dataclass
class Case:
    """One way of answering the prompt, and its seconds in every round."""

    name: str
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    bytes_held: int = 0


def main(
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 2900,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 64,
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one that is not.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes.")] = None,
) -> None:
    """Run the benchmark and print its table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = random_model(getattr(torch, dtype))
    kept = round(0.1 * prompt)
    cases = {
        name: Case(name)
        for name in ("transformers", "transformers, kept length", "vl-cache at 10 %", "elastic at 10 %")
    }
    for counted in track(range(-1, rounds), description="rounds"):
        for case in cases.values():
            inputs = random_inputs(kept if case.name.endswith("kept length") else prompt)
            cache = make_cache(case.name, model, inputs)
            prefill, token, held = run(model, inputs["input_ids"], cache, new_tokens)
            if counted >= 0:
                case.prefill.append(prefill)
                case.token.append(token)
                case.bytes_held = held
    result = summary(cases, prompt, kept, new_tokens, rounds, dtype)
    show(result)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


def random_model(dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of 8 layers x 512, 8 heads, with random weights."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval().to(dtype=dtype)


def random_inputs(length: int) -> dict[str, Tensor]:
    """A prompt of random tokens, all but its first and last ones marked as vision."""
    types = torch.ones(1, length, dtype=torch.long)
    types[:, :FIRST_TEXT_TOKENS] = 0
    types[:, -POST_VISION_TOKENS:] = 0
    return {"input_ids": torch.randint(4096, (1, length)), "mm_token_type_ids": types}


def make_cache(name: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Cache:
    """A fresh cache for a case."""
    if name.startswith("transformers"):
        return DynamicCache(config=model.config)
    recipe = VLCache(budget=0.1) if name.startswith("vl-cache") else ElasticCache(budget=0.1)
    return CompressedCache(model, recipe, inputs)


@torch.inference_mode()
def run(model: PreTrainedModel, input_ids: Tensor, cache: Cache, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prefill, seconds of a decoded token (median), and bytes held after the prefill."""
    start = time.perf_counter()
    token = model(input_ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    prefill = time.perf_counter() - start
    held = cache.nbytes if isinstance(cache, CompressedCache) else dynamic_bytes(cache)
    seconds = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        seconds.append(time.perf_counter() - start)
    return prefill, statistics.median(seconds), held


def dynamic_bytes(cache: Any) -> int:
    """Bytes of a plain transformers cache's keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def summary(cases: dict[str, Case], prompt: int, kept: int, new_tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """The result as plain data."""
    full, short = cases["transformers"], cases["transformers, kept length"]
    return {
        "command": "python -m bench.core " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "Llama, 8 layers x 512, 8 heads, random weights",
        "prompt_tokens": prompt,
        "kept_length": kept,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "dtype": dtype,
        "cases": {
            case.name: {
                "prefill_seconds": statistics.median(case.prefill),
                "prefill_spread": [min(case.prefill), max(case.prefill)],
                "token_seconds": statistics.median(case.token),
                "token_spread": [min(case.token), max(case.token)],
                "prefill_ratio": ratio(case.prefill, full.prefill),
                "token_ratio": ratio(case.token, full.token),
                "token_ratio_to_kept_length": ratio(case.token, short.token),
                "bytes_held": case.bytes_held,
                "bytes_ratio": case.bytes_held / full.bytes_held,
            }
            for case in cases.values()
        },
    }


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    table = Table(title=f"{result['model']}, {result['dtype']}, prompt of {result['prompt_tokens']} tokens")
    columns = (
        "",
        "prefill",
        "x full",
        "token",
        "x full",
        f"x prompt of {result['kept_length']}",
        "MiB held",
        "of full",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, case in result["cases"].items():
        table.add_row(
            name,
            f"{case['prefill_seconds'] * 1e3:.0f} ms",
            f"{case['prefill_ratio']:.3f}",
            f"{case['token_seconds'] * 1e3:.2f} ms",
            f"{case['token_ratio']:.3f}",
            f"{case['token_ratio_to_kept_length']:.3f}",
            f"{case['bytes_held'] / 2**20:.2f}",
            f"{case['bytes_ratio']:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
