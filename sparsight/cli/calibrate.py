"""``sparsight calibrate``: measure which KV heads of a model read, once, for SparseMM."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparsight.cli import options
from sparsight.eval.calibration import head_scores
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader.transcript import random_transcript


def calibrate(
    model: options.Model = options.DEFAULT_MODEL,
    pages: Annotated[int, typer.Option(help="Pages that are drawn for it.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the pages.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="The JSON file to write.", metavar="FILE")] = Path("heads.json"),
    as_json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Score each KV head by how often it looks at the text that is about to be read, for the method sparsemm."""
    if not output.parent.is_dir():
        raise ValueError(f"--output must be a file in a folder that exists, got {output}.")
    checkpoint = load_checkpoint(model)
    loaded = load_model(checkpoint, device, dtype)
    drawn = (random_transcript(np.random.default_rng([seed, page])) for page in range(pages))
    console = Console(stderr=True)
    shown = track(drawn, "Reading pages", pages, console=console, transient=True, disable=not console.is_terminal)
    scores = head_scores(loaded, checkpoint, shown)
    name = "the model that ships with Sparsight" if model == options.DEFAULT_MODEL else model
    result = {"model": name, "pages": pages, "seed": seed, "scores": scores}
    output.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        print(json.dumps({**result, "output": str(output)}))
    else:
        Console(highlight=False).print(table(scores))
        print(f"\nWrote {output}: give it to `sparsight generate --method sparsemm --heads {output}`.")


def table(scores: list[list[float]]) -> Table:
    """The scores, a row a layer, those of the best tenth of all heads in bold."""
    ranked = sorted((score for layer in scores for score in layer), reverse=True)
    best = ranked[max(0, len(ranked) // 10 - 1)]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("layer", justify="right")
    for head in range(len(scores[0])):
        shown.add_column(f"head {head}", justify="right", header_style="bold cyan")
    for index, layer in enumerate(scores):
        cells = [f"[bold]{score:.2f}[/bold]" if score >= best > 0 else f"{score:.2f}" for score in layer]
        shown.add_row(str(index), *cells)
    return shown
