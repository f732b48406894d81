"""Held-out accuracy of every skill, with the full cache: `python -m training.evaluate`.

An answer is right if every one of its tokens is the model's most likely one, so that greedy decoding would produce it
(in a conversation, given the right earlier answers). Transcriptions are generated, and measured by their character
error rate without line numbers and END line, which are easily predicted.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight import CompressedCache, Recipe
from sparsight.models.inputs import apply_chat_template
from sparsight.reader import model_path
from sparsight.reader.skills import Example, compare, look_at, look_up, read_out
from training.loop import device
from training.prompt import batch_of

Result = dict[str, float | int | str]
Maker = Callable[[np.random.Generator], Example]

JUDGED: dict[str, tuple[Maker, float]] = {
    "look-up, 32 records": (lambda rng: look_up(rng, "heldout", 32), 0.97),
    "look-up, 64 records": (lambda rng: look_up(rng, "heldout", 64), 0.90),
    "several questions": (lambda rng: look_up(rng, "heldout", int(rng.integers(8, 65)), questions=4), 0.95),
    "scenes": (lambda rng: look_at(rng, "heldout"), 0.95),
    "two images": (lambda rng: compare(rng, "heldout", int(rng.integers(2, 33))), 0.93),
}
"""Skill: how to make an example, and the accuracy required."""

READING, READING_BAR = "reading, 1-20 records", 0.03


@torch.inference_mode()
def judge(model: Any, processor: Any, examples: list[Example]) -> list[list[bool]]:
    """For each example, whether each of its answers is right, by one forward pass over questions and answers."""
    batch = batch_of(processor.tokenizer, examples)
    pictures = [picture for example in examples for picture in example.pictures()]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    logits = model(input_ids=batch.ids.to(model.device), pixel_values=pixels, use_cache=False).logits.cpu()
    verdicts = []
    for index, example in enumerate(examples):
        labels = batch.labels[index]
        hits = (logits[index].argmax(-1) == labels)[labels >= 0].tolist()
        sizes = [len(processor.tokenizer(answer)["input_ids"]) + 1 for _, answer in example.turns]
        ends = np.cumsum(sizes)
        verdicts.append([all(hits[end - size : end]) for size, end in zip(sizes, ends, strict=True)])
    return verdicts


@torch.inference_mode()
def answers(
    model: Any, processor: Any, examples: list[Example], limit: int = 300, recipe: Recipe | None = None
) -> list[str]:
    """Greedy answers to each example's first question, with the full cache if `recipe` is None."""
    conversations = []
    for example in examples:
        content = [{"type": "image", "image": picture} for picture in example.pictures()]
        conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": example.turns[0][0]}]}])
    inputs = apply_chat_template(processor, conversations).to(model.device, model.dtype)
    cache = CompressedCache(model, recipe, inputs) if recipe else None
    made = model.generate(**inputs, past_key_values=cache, max_new_tokens=limit, do_sample=False)
    made = made[:, inputs["input_ids"].shape[1] :]
    return list(processor.batch_decode(made, skip_special_tokens=True))


def records_of(text: str) -> str:
    """The records in a transcript of a list, without line numbers and the END line."""
    return re.sub(r"^\d\d\. (END$)?", "", text, flags=re.MULTILINE)


def edits(a: str, b: str) -> int:
    """Edit distance: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def accuracy(model: Any, processor: Any, make: Maker, count: int, seed: int, batch: int) -> tuple[float, int]:
    """Fraction of right answers over `count` examples, and the number of questions."""
    verdicts: list[bool] = []
    for start in range(0, count, batch):
        examples = [make(np.random.default_rng([seed, i])) for i in range(start, min(count, start + batch))]
        verdicts += [right for example in judge(model, processor, examples) for right in example]
    return sum(verdicts) / len(verdicts), len(verdicts)


def character_error_rate(model: Any, processor: Any, count: int, seed: int, batch: int) -> float:
    """Edits per character of the records, over transcripts of `count` lists of 1 to 20 records."""
    wrong = total = 0
    for start in range(0, count, batch):
        rngs = [np.random.default_rng([seed, i]) for i in range(start, min(count, start + batch))]
        examples = [read_out(rng, "heldout", int(rng.integers(1, 21))) for rng in rngs]
        for example, text in zip(examples, answers(model, processor, examples), strict=True):
            right = records_of(example.turns[0][1])
            wrong += edits(records_of(text), right)
            total += len(right)
    return wrong / total


def main(
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder; the shipped one by default.")] = None,
    count: Annotated[int, typer.Option(help="Examples of each skill.")] = 1000,
    skill: Annotated[list[str] | None, typer.Option(help="Only skills that begin with this; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the held-out examples.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
) -> None:
    """Print the accuracy of every skill as a table and as JSON."""
    folder = model or model_path()
    processor = AutoProcessor.from_pretrained(folder)
    reader: Any = AutoModelForImageTextToText.from_pretrained(folder)
    reader = reader.to(device()).eval()
    results: list[Result] = []
    wanted = tuple(skill or [""])
    for name, (make, bar) in JUDGED.items():
        if not name.startswith(wanted):
            continue
        began = time.monotonic()
        score, questions = accuracy(reader, processor, make, count, seed, batch)
        results.append({"skill": name, "measure": "exact match", "value": score, "asked": bar, "examples": count})
        results[-1] |= {"questions": questions, "seconds": round(time.monotonic() - began, 1)}
    if READING.startswith(wanted):
        began = time.monotonic()
        rate = character_error_rate(reader, processor, count, seed, 2 * batch)
        results.append({"skill": READING, "measure": "character error rate", "value": rate, "asked": READING_BAR})
        results[-1] |= {"examples": count, "questions": count, "seconds": round(time.monotonic() - began, 1)}

    table = Table("skill", "measure", "value", "asked", "examples", "questions", "seconds")
    for result in results:
        table.add_row(*(f"{v:.3f}" if k == "value" else str(v) for k, v in result.items()))
    Console(stderr=True).print(table)
    report = json.dumps({"seed": seed, "split": "heldout", "dtype": str(reader.dtype), "results": results}, indent=2)
    print(report)
    if out:
        out.write_text(report + "\n")


if __name__ == "__main__":
    typer.run(main)
