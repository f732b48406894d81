"""What recall adds to a token's time: the `small` shape, one thread, processor time.

    python -m benchmarks.recall_cost

Methods take turns at every token. The weights are random, so that more entries change from one ranking to the next
than with a trained model.
"""

import time
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer

from sparsight import CompressedCache, recipe
from sparsight.bench.shapes import SHAPES, random_inputs, random_model
from sparsight.compression import LowRank

WARM_UP = 8
"""Tokens that are not counted; a multiple of every interval."""


@torch.inference_mode()
def main(context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2900, tokens: int = 64) -> None:
    """Print the mean of a token's time over an interval between two rankings, from medians over the intervals."""
    torch.set_num_threads(1)
    model: Any = random_model(SHAPES["small"], torch.device("cpu"), torch.float32)
    inputs = random_inputs(model, context, 1)
    methods = {
        "full": (recipe("full"), 1),
        "without recall": (recipe("sparsight-recall").combined(decode="grow"), 1),
        **{f"every {every}": (recipe("sparsight-recall", every=every), every) for every in (4, 2, 1)},
        "every 4, low rank": (recipe("sparsight-recall", index=LowRank()), 4),
    }
    caches = {name: CompressedCache(model, method, inputs) for name, (method, _) in methods.items()}
    newest = {
        name: model(input_ids=inputs["input_ids"], past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        for name, cache in caches.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(tokens):
        for name, cache in caches.items():
            started = time.thread_time()
            newest[name] = model(input_ids=newest[name], past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            seconds[name].append(time.thread_time() - started)
    for name, (_, every) in methods.items():
        measured = seconds[name][WARM_UP:]
        print(f"{name:20} {1000 * fmean(median(measured[place::every]) for place in range(every)):6.2f} ms")


if __name__ == "__main__":
    typer.run(main)
