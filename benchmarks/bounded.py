"""Accuracy of the bundled model with a bounded prefill: unchunked, and in chunks after each of which layers are cut.

python -m benchmarks.bounded --output benchmarks/results/bounded.json
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparsight import CompressedCache, Recipe, recipe
from sparsight.bench import machine
from sparsight.compression import Evict, Grow, PostVision, Uniform
from sparsight.eval.tasks import task
from sparsight.models.inputs import prepare
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader import model_path

BUDGET = 0.1
METHODS = {
    "post-vision": Recipe("post-vision", BUDGET, PostVision(pool=(1, 5)), Uniform(), Evict(), Grow()),
    "snapkv": recipe("snapkv", budget=BUDGET),
    "h2o": recipe("h2o", budget=BUDGET),
}
"""Recipes whose prompts can be cut between chunks."""

CASES = ((None, None), (3, None), (3, 300), (3, 128), (3, 64), (8, 128))
"""Prefill bound and tokens per chunk."""


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the result.")],
    limit: Annotated[int, typer.Option(help="Pages.", min=1)] = 60,
) -> None:
    """Count the right answers about pages in every case."""
    checkpoint = load_checkpoint(str(model_path()))
    model: Any = load_model(checkpoint, "cpu", "auto")
    right = {(method, *case): 0 for method in METHODS for case in CASES}
    tokens = 0
    for number in track(range(limit), "pages", console=Console(stderr=True)):
        page = task("look-up").example(1, number)
        question, answer = page.turns[0]
        inputs = prepare(checkpoint, list(page.pictures()), question)
        tokens = inputs["input_ids"].shape[1]
        for method, bound, chunk in right:
            cache = CompressedCache(model, METHODS[method], inputs, prefill_bound=bound)
            output_ids = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=8, do_sample=False, prefill_chunk_size=chunk
            )
            text = checkpoint.processor.tokenizer.decode(output_ids[0, tokens:], skip_special_tokens=True)
            right[method, bound, chunk] += text.strip() == answer.strip()
    result = {
        "command": "python -m benchmarks.bounded " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(model.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pages": limit,
        "prompt_tokens": tokens,
        "budget": BUDGET,
        "right": [
            {"method": method, "bound": bound, "chunk": chunk, "pages": count}
            for (method, bound, chunk), count in right.items()
        ],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    shown = Table("bound", "chunk", *METHODS, title=f"right answers, of {limit} pages of {tokens} tokens, {BUDGET:.0%}")
    for bound, chunk in CASES:
        counts = (str(right[method, bound, chunk]) for method in METHODS)
        shown.add_row(str(bound or "none"), str(chunk or "unchunked"), *counts)
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
