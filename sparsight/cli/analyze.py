"""``sparsight analyze``: where a model's attention goes, and how well scores predict it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparsight.cache import CompressedCache
from sparsight.cli import options
from sparsight.eval.analysis import FRACTIONS, Statistics, analyze, summarize
from sparsight.eval.analysis_plots import draw_analysis
from sparsight.eval.prompt_sets import generate_prompts, read_prompts
from sparsight.methods import Full
from sparsight.models.images import MAX_PIXELS
from sparsight.models.loading import load_checkpoint, load_model, prepare
from sparsight.utils import checks
from sparsight.utils.interrupt import sigterm_as_interrupt
from sparsight.utils.plot_style import save


def analyze_model(
    model: options.Model = options.DEFAULT_MODEL,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON lines of {"image": ..., "prompt": ...}; generated pages if not given.', metavar="FILE"),
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the generated pages.", min=0)] = 0,
    budget: options.Budget = 0.1,
    threshold: Annotated[float, typer.Option(help="p of the threshold filter, in (0, 1].")] = 0.01,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 32,
    output: Annotated[Path, typer.Option(help="Folder for analysis.png and analysis.json.", metavar="DIR")] = Path(
        "runs/analysis"
    ),
    as_json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_pixels: options.MaxPixels = MAX_PIXELS,
) -> None:
    """Measure attention sparsity, what decoding attends to, how well scores predict it, and budgets by layer."""
    checks.fraction("budget", budget)
    checks.fraction("threshold", threshold)
    prompt_set = list(generate_prompts(seed, limit) if prompts is None else read_prompts(prompts, limit, max_pixels))
    checkpoint = load_checkpoint(model)
    loaded = load_model(checkpoint, device, dtype)
    console = Console(stderr=True)
    statistics: list[Statistics] = []
    inputs: Any = None
    stopped = False
    try:
        with sigterm_as_interrupt():
            for each in track(prompt_set, "Analyzing", console=console, disable=as_json or not console.is_terminal):
                inputs = prepare(checkpoint, each.images, each.prompt).to(loaded.device, loaded.dtype)
                statistics.append(analyze(loaded, inputs, budget, threshold, max_new_tokens))
    except KeyboardInterrupt as stop:
        if not statistics:
            print("Stopped before the first prompt was analyzed.", file=sys.stderr)
            raise typer.Exit(130) from stop
        stopped = True
    found = {
        "model": "the model that ships" if model == options.DEFAULT_MODEL else model,
        "prompts": len(statistics),
        "source": "generated pages" if prompts is None else str(prompts),
        "budget": budget,
        "threshold": threshold,
        "fractions": FRACTIONS,
        "layers": CompressedCache(loaded, Full(), inputs).report().layers,
        **summarize(statistics),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "analysis.json").write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"Cannot write to {output}: {error.strerror}.") from error
    save(draw_analysis(found), output / "analysis.png")
    if stopped:
        written = f"analysis.png and analysis.json in {output} are of the first {len(statistics)}"
        print(f"Stopped. {written} of {len(prompt_set)} prompts.", file=sys.stderr)
        raise typer.Exit(130)
    if as_json:
        print(json.dumps(found))
        return
    shown = Console(highlight=False)
    shown.print(table(found), "")
    shown.print(f"Wrote analysis.png and analysis.json in {output}", markup=False)


def table(found: dict[str, Any]) -> Table:
    """Sparsity and attention by layer."""
    shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    shown.add_column("layer", justify="right", header_style="bold cyan")
    columns = [("sparsity", name) for name in found["sparsity"]] + [("attention", name) for name in found["attention"]]
    for statistic, name in columns:
        title = f"{name}\nsparsity" if statistic == "sparsity" else f"attention\nto {name}"
        shown.add_column(title, justify="right", header_style="bold cyan")
    for place, layer in enumerate(found["layers"]):
        shown.add_row(
            str(layer), *(f"{found[statistic][name]['mean'][place] * 100:.1f} %" for statistic, name in columns)
        )
    return shown
