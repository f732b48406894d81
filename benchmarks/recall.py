"""Recall while decoding: what is varied around the recipe `sparsight-recall`; lists of the training split, read out.

    python -m benchmarks.recall --output benchmarks/results/recall-12.json

An interrupted run can be resumed: what is in the file is not measured again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer

from sparsight import Recipe, Sparsight
from sparsight.compression import BlockBounds, LowRank
from sparsight.eval.collate import conversations, group_by_answer_length, tokenizer_of
from sparsight.eval.evaluator import FULL, end_tokens, until_end
from sparsight.eval.metrics import exact_match, rouge_l
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.methods import SparsightRecall
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader import model_path
from sparsight.reader.skills import read_out

BUDGET = 0.05
VARIED: Mapping[str, Sequence[Any]] = {
    "every": (2, 3, 8),
    "prior": (0.0, 0.3, 3.0),
    "floor": (0.1, 0.3, 1.0),
    "pool": ((1, 3), (1, 11)),
    "index": (LowRank(8, 4), BlockBounds(4)),
}
"""Numbers of the recipe, each varied alone."""


def candidates() -> list[Recipe]:
    """The full cache, both methods, and every variation, under names that say what is varied."""
    named = {"sparsight": Sparsight(BUDGET), "sparsight-recall": SparsightRecall(BUDGET)}
    for number, values in VARIED.items():
        named |= {f"{number} {value}": SparsightRecall(BUDGET, **{number: value}) for value in values}
    return [FULL, *(replace(recipe, name=name) for name, recipe in named.items())]


@torch.inference_mode()
def measure(snapshot: PrefillSnapshot, recipe: Recipe, given: Any, right: Sequence[str], processor: Any) -> list[Any]:
    """Exact match and ROUGE-L of each answer of a batch."""
    model: Any = snapshot.model
    first, length = snapshot.logits.argmax(-1, keepdim=True), given.answers[0].shape[1]
    ids = torch.cat([given.inputs["input_ids"], first], dim=1)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.cat([given.inputs["attention_mask"], torch.ones_like(first)], dim=1),
        past_key_values=snapshot.cache(recipe),
        max_new_tokens=length + length // 4,
        do_sample=False,
        num_beams=1,
    )
    tokenizer = tokenizer_of(processor)
    ends = end_tokens(model, tokenizer)
    tokens = [until_end(each, ends) for each in output[:, ids.shape[1] - 1 :].tolist()]
    texts = [tokenizer.decode(each, skip_special_tokens=True) for each in tokens]
    return [[exact_match(*pair), rouge_l(*pair)] for pair in zip(texts, right, strict=True)]


def main(
    output: Annotated[Path, typer.Option(help="JSON file with the results.")],
    records: Annotated[int, typer.Option(help="Records of a list.")] = 12,
    limit: Annotated[int, typer.Option(help="Lists.")] = 16,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Measure exact match and ROUGE-L of every recipe on the same lists, and print the means."""
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(str(model_path()))
    model, processor = load_model(checkpoint), checkpoint.processor
    about = {"records": records, "seed": seed, "limit": limit}
    examples = {n: read_out(np.random.default_rng([seed, n]), "train", records) for n in range(limit)}
    results: dict[str, list[Any]] = {}
    if output.exists():
        there = json.loads(output.read_text())
        if there["about"] != about:
            raise typer.BadParameter(f"{output} has results of {there['about']}, not of {about}.")
        results = there["results"]
    for number, batch in enumerate(group_by_answer_length(tokenizer_of(processor), examples, 16)):
        lists = [examples[n] for n in batch]
        given = conversations(processor, lists, model.device, model.dtype)
        snapshot = PrefillSnapshot(model, given.inputs)
        for recipe in candidates():
            cell = results.setdefault(recipe.name, [])
            if len(cell) == number:
                cell.append(measure(snapshot, recipe, given, [each.turns[0][1] for each in lists], processor))
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps({"about": about, "results": results}) + "\n")
                print(number, recipe.name, [round(fmean(each), 3) for each in zip(*cell[-1], strict=True)], flush=True)
    print(f"\n{'recipe':50} {'n':>4} {'exact':>6} {'ROUGE-L':>8}")
    for name, batches in results.items():
        rows = [each for batch in batches for each in batch]
        exact, rouge = (fmean(each) for each in zip(*rows, strict=True))
        print(f"{name:50} {len(rows):4} {exact:6.3f} {rouge:8.3f}")


if __name__ == "__main__":
    typer.run(main)
