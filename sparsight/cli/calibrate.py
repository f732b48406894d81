"""``sparsight calibrate``: score a model's KV heads by how much they read, once, for SparseMM."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from sparsight.cli import options
from sparsight.cli.output import check_file, writing
from sparsight.cli.progress import tracked
from sparsight.cli.terminal import show
from sparsight.utils.text import escape


def main(
    pages: Annotated[int, typer.Option(help="Number of generated pages to read.", min=1)] = 50,
    seed: options.Seed = 0,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[Path, options.output("JSON file to write", "FILE")] = Path("heads.json"),
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure head scores for the method sparsemm: how often each KV head attends to the text to be read next."""
    import numpy as np

    from sparsight.eval.calibration import head_scores
    from sparsight.models.loading import load_checkpoint, load_model
    from sparsight.reader.transcript import random_transcript

    check_file(output, replace=force)
    checkpoint = load_checkpoint(model)
    loaded = load_model(checkpoint, device, dtype)
    transcripts = (random_transcript(np.random.default_rng([seed, page])) for page in range(pages))
    scores = head_scores(loaded, checkpoint, tracked(transcripts, "Reading pages", pages, quiet=quiet or as_json))
    name = options.model_name(model)
    result = {"model": name, "pages": pages, "seed": seed, "scores": scores}
    with writing(output):
        output.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        print(json.dumps({**result, "output": str(output)}))
    else:
        show(table(scores))
        print(f"\nWrote {escape(output)}; use it with --method sparsemm --heads {escape(output)}")


def table(scores: list[list[float]]) -> Table:
    """The scores with one row per layer; the best tenth of all heads is in bold."""
    ranked = sorted((score for layer in scores for score in layer), reverse=True)
    best = ranked[max(0, len(ranked) // 10 - 1)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    for head in range(len(scores[0])):
        table.add_column(f"head {head}", justify="right", header_style="bold cyan")
    for index, layer in enumerate(scores):
        cells = [Text(f"{score:.2f}", "bold" if score >= best > 0 else "") for score in layer]
        table.add_row(str(index), *cells)
    return table
