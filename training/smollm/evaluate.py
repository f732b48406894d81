"""Held-out accuracy of `reader-30`, with the full cache: `python -m training.smollm.evaluate`.

`sparsight eval --model reader-30 --tasks conversation:4` measures several questions about one page.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from sparsight import load
from sparsight.reader.skills import compare, look_up, read_out
from training.evaluate import Maker, answers, edits, records_of

LOOK_UPS: dict[str, Maker] = {
    "look-up, 8 records": lambda rng: look_up(rng, "heldout", 8),
    "look-up, 24 records": lambda rng: look_up(rng, "heldout", 24),
    "look-up, 32 records": lambda rng: look_up(rng, "heldout", 32),
    "two pages of 16": lambda rng: compare(rng, "heldout", 16, pages=1.0),
}
LIST = 8
"""Records of a list."""


def main(
    model: Annotated[str, typer.Option(help="The checkpoint.")] = "reader-30",
    count: Annotated[int, typer.Option(help="Examples of each skill.")] = 200,
    seed: int = 7,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this file.")] = None,
) -> None:
    """Print the accuracies as JSON: exact match, and the character error rate of lists."""
    network, processor = load(model)
    results: dict[str, float | int] = {"examples": count}
    for name, make in LOOK_UPS.items():
        examples = [make(np.random.default_rng([seed, index])) for index in range(count)]
        right = [answers(network, processor, [example], 8) == [example.turns[0][1]] for example in examples]
        results[name] = sum(right) / count
        print(json.dumps({name: results[name]}), flush=True)
    wrong = length = 0
    for index in range(count // 2):
        example = read_out(np.random.default_rng([seed, index]), "heldout", LIST)
        said, wanted = (records_of(text) for text in (*answers(network, processor, [example]), example.turns[0][1]))
        wrong, length = wrong + edits(said, wanted), length + len(wanted)
    results[f"lists of {LIST}, character error rate"] = wrong / length
    print(json.dumps(results))
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
