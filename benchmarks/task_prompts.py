"""Images and first questions of a task of ``sparsight eval`` as JSON lines, for ``sparsight analyze``.

python -m benchmarks.task_prompts transcribe:4 runs/lists --limit 50 --seed 1
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsight.eval.tasks import task


def main(
    name: Annotated[str, typer.Argument(help="A task, optionally with its size.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the images and asked.jsonl.")],
    limit: Annotated[int, typer.Option(help="Examples.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the examples.")] = 0,
) -> None:
    """Write a task's first examples."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(limit):
        example = task(name).example(seed, number)
        names = [f"{number}-{place}.png" for place in range(len(example.images))]
        for file, image in zip(names, example.pictures(), strict=True):
            image.save(folder / file)
        rows.append(json.dumps({"id": str(number), "images": names, "prompt": example.turns[0][0]}))
    (folder / "asked.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
