"""Train the model on SmolLM2, or continue: `python -m training.smollm.train`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from sparsight.models.install import install
from sparsight.models.reader_30 import spelling_tokenizer
from training.smollm.eyes import Eyes
from training.smollm.read import learn_to_read, student


def main(
    work: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("runs/smollm"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps in total.")] = 1250,
    tokens: Annotated[int, typer.Option(help="Tokens per step, about.")] = 1000,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="Rank of the updates.")] = 32,
) -> None:
    """Train SmolLM2 to read pages."""
    torch.set_num_threads(threads)
    folder = install("smollm2")
    pupil = student(folder, spelling_tokenizer(folder), rank, seed=0)
    learn_to_read(pupil, work / "read.pt", steps, tokens, rate, seed=1, look=Eyes().features)


if __name__ == "__main__":
    typer.run(main)
