"""Pictures and first questions of one of ``sparsight eval``'s tasks as JSON lines, for ``sparsight analyze``.

python -m benchmarks.task_prompts transcribe:4 runs/lists --limit 50 --seed 1
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsight.eval.tasks import task


def main(
    name: Annotated[str, typer.Argument(help="A task, with its size if need be.")],
    folder: Annotated[Path, typer.Argument(help="Where the pictures and asked.jsonl go.")],
    limit: Annotated[int, typer.Option(help="Examples.")] = 50,
    seed: Annotated[int, typer.Option(help="Their seed.")] = 0,
) -> None:
    """Draw a task's first examples."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(limit):
        example = task(name).example(seed, number)
        names = [f"{number}-{place}.png" for place in range(len(example.images))]
        for file, picture in zip(names, example.pictures(), strict=True):
            picture.save(folder / file)
        rows.append(json.dumps({"id": str(number), "images": names, "prompt": example.turns[0][0]}))
    (folder / "asked.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
