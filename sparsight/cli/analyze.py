"""``sparsight analyze``: what a model attends to while decoding, and how well scores predict it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sparsight.cli import options
from sparsight.cli.output import check_folder, writing
from sparsight.cli.parsing import check_budget
from sparsight.cli.progress import tracked
from sparsight.cli.terminal import show
from sparsight.models.images import MAX_PIXELS
from sparsight.utils import checks
from sparsight.utils.text import escape


def main(
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines such as {"image": "page.png", "prompt": "What is this?"}; without it, generated pages.',
            metavar="FILE",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Number of prompts.", min=1)] = 20,
    seed: options.Seed = 0,
    budget: Annotated[
        float, typer.Option(help="Budget at which allocations are compared, in (0, 1].", callback=check_budget)
    ] = 0.1,
    threshold: Annotated[
        float, typer.Option(help="p of the threshold filter (arXiv 2410.23317, equation 1), in (0, 1].")
    ] = 0.01,
    max_new_tokens: options.MaxNewTokens = 32,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_pixels: options.MaxPixels = MAX_PIXELS,
    output: Annotated[Path, options.output("Folder for analysis.json and analysis.png", "DIR")] = Path("runs/analysis"),
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure attention sparsity, what decoding attends to, score hit rates and layer budgets."""
    from sparsight.cache import CompressedCache
    from sparsight.eval.analysis import FRACTIONS, Statistics, analyze, summarize
    from sparsight.eval.analysis_plots import draw_analysis
    from sparsight.eval.prompt_sets import generate_prompts, read_prompts
    from sparsight.methods import Full
    from sparsight.models.inputs import prepare
    from sparsight.models.loading import load_checkpoint, load_model
    from sparsight.utils.plot_style import save

    checks.fraction("threshold", threshold)
    check_folder(output, "analysis.json", replace=force)
    prompt_set = list(generate_prompts(seed, limit) if prompts is None else read_prompts(prompts, limit, max_pixels))
    checkpoint = load_checkpoint(model)
    loaded = load_model(checkpoint, device, dtype)
    statistics: list[Statistics] = []
    inputs: Any = None
    interrupted = False
    try:
        for question in tracked(prompt_set, "Analyzing", len(prompt_set), quiet=quiet or as_json):
            inputs = prepare(checkpoint, question.images, question.prompt).to(loaded.device, loaded.dtype)
            statistics.append(analyze(loaded, inputs, budget, threshold, max_new_tokens))
    except KeyboardInterrupt as stop:
        if not statistics:
            print("Stopped before the first prompt was analyzed.", file=sys.stderr)
            raise typer.Exit(130) from stop
        interrupted = True
    results = {
        "model": options.model_name(model),
        "prompts": len(statistics),
        "source": "generated pages" if prompts is None else str(prompts),
        "budget": budget,
        "threshold": threshold,
        "fractions": FRACTIONS,
        "layers": CompressedCache(loaded, Full(), inputs).report().layers,
        **summarize(statistics),
    }
    with writing(output / "analysis.json"):
        (output / "analysis.json").write_text(json.dumps(results, indent=1) + "\n")
    save(draw_analysis(results), output / "analysis.png")
    if interrupted:
        written = f"analysis.json and analysis.png in {escape(output)} are of the first {len(statistics)}"
        print(f"Stopped. {written} of {len(prompt_set)} prompts.", file=sys.stderr)
        raise typer.Exit(130)
    if as_json:
        print(json.dumps(results))
        return
    show(table(results))
    print(f"\nWrote analysis.json and analysis.png in {escape(output)}")


def table(results: dict[str, Any]) -> Table:
    """Sparsity and attention by layer."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("layer", justify="right", header_style="bold cyan")
    columns = [("sparsity", name) for name in results["sparsity"]] + [
        ("attention", name) for name in results["attention"]
    ]
    for statistic, name in columns:
        title = f"{name}\nsparsity" if statistic == "sparsity" else f"attention to\n{name}"
        table.add_column(title, justify="right", header_style="bold cyan")
    for index, layer in enumerate(results["layers"]):
        table.add_row(
            str(layer), *(f"{results[statistic][name]['mean'][index] * 100:.1f} %" for statistic, name in columns)
        )
    return table
