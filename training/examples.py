"""Render the images in `examples/` and write their questions: `python -m training.examples`.

For each kind, the first held-out images are taken for which the shipped model answers the question right. Receipts must
also be answered right with VL-Cache at a 10 % budget.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight import VLCache
from sparsight.reader import model_path
from sparsight.reader.receipt import random_receipt
from sparsight.reader.skills import Example, ask_page, compare, look_at, look_up, read_out
from training.evaluate import answers


def slip(rng: np.random.Generator) -> Example:
    """A receipt or form, printed dark on light, with one question about it."""
    while True:
        page = random_receipt(rng, int(rng.integers(8, 14)), "heldout")
        if sum(page.style.paper) > sum(page.style.ink):
            return Example((page,), tuple(ask_page(rng, page, 1)))


KINDS: dict[str, tuple[Callable[[np.random.Generator], Example], int]] = {
    "receipt": (slip, 3),
    "page": (lambda rng: look_up(rng, "heldout", int(rng.choice([24, 48, 64]))), 4),
    "list": (lambda rng: read_out(rng, "heldout", int(rng.integers(5, 21))), 2),
    "scene": (lambda rng: look_at(rng, "heldout"), 3),
    "pair": (lambda rng: compare(rng, "heldout", 12), 2),
}
"""Kind of image: how to make one, and how many to keep."""


def main(folder: Annotated[Path, typer.Option()] = Path("examples"), seed: int = 4) -> None:
    """Write the images as PNG files and `questions.json`."""
    processor = AutoProcessor.from_pretrained(model_path())
    model = AutoModelForImageTextToText.from_pretrained(model_path()).eval()
    folder.mkdir(exist_ok=True)
    entries = []
    for kind, (make, wanted) in KINDS.items():
        kept = tried = 0
        while kept < wanted and tried < 20 * wanted:
            example = make(np.random.default_rng([seed, tried]))
            tried += 1
            question, answer = example.turns[0]
            recipes = (None, VLCache(budget=0.1)) if kind == "receipt" else (None,)
            if any(answers(model, processor, [example], recipe=recipe) != [answer] for recipe in recipes):
                continue
            kept += 1
            names = [f"{kind}-{kept}{part}.png" for part in ("", "b")[: len(example.images)]]
            for name, picture in zip(names, example.pictures(), strict=True):
                picture.save(folder / name)
            image = names[0] if len(names) == 1 else names
            entries.append({"image": image, "question": question, "answer": answer})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
