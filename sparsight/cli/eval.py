"""``sparsight eval``: accuracy of methods at budgets, measured on tasks."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsight.cli import options
from sparsight.cli.parsing import budget_list, names
from sparsight.cli.progress import progress
from sparsight.cli.recipe_options import with_scores
from sparsight.compression import VisualHeads
from sparsight.compression.recipe import Recipe
from sparsight.eval import render
from sparsight.eval.evaluate import Plan, run, weights_digest
from sparsight.eval.store import Store
from sparsight.eval.summary import results
from sparsight.eval.tasks import TASKS, task
from sparsight.methods import RECIPES, recipe
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.utils.suggest import unknown

HARNESSES = ("sparsight", "lmms-eval")
BUDGETS = "0.01,0.05,0.1,0.2,0.4,1.0"


def evaluate(
    model: options.Model = options.DEFAULT_MODEL,
    tasks: Annotated[
        str, typer.Option(help=f"{', '.join(TASKS)}, or all; with a size as in look-up:64.", metavar="NAMES")
    ] = "all",
    methods: Annotated[str, typer.Option(help="Methods that `sparsight methods` lists, or all.", metavar="NAMES")] = (
        "all"
    ),
    budgets: Annotated[str, typer.Option(help="Fractions of the prompt's KV entries.", metavar="NUMBERS")] = BUDGETS,
    heads: options.Heads = None,
    limit: Annotated[int, typer.Option(help="Examples of each task.", min=2)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the examples.", min=0)] = 0,
    batch: Annotated[
        int, typer.Option(help="Examples that are worked on together; large models need fewer.", min=1)
    ] = 64,
    output: Annotated[Path, typer.Option(help="Folder of the run: resumed if it is there.", metavar="DIR")] = Path(
        "runs/eval"
    ),
    harness: Annotated[
        str, typer.Option(help="Who asks: sparsight's own tasks, or lmms-eval with its benchmarks.", metavar="NAME")
    ] = HARNESSES[0],
    include: Annotated[
        Path | None, typer.Option(help="A folder of more tasks in lmms-eval's format.", metavar="DIR")
    ] = None,
    as_json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Measure what methods keep of a model's accuracy at budgets; a stopped run goes on where it was."""
    if harness not in HARNESSES:
        raise unknown("harness", harness, HARNESSES)
    recipes = _recipes(model, methods, budgets, heads)
    try:
        with progress("Evaluating", quiet=as_json) as on_progress:
            if harness == "lmms-eval":
                found = _benchmarks(model, tasks, recipes, limit, batch, include, output, device, dtype, on_progress)
            else:
                plan = Plan([task(name) for name in names(tasks, TASKS)], recipes, limit, seed, batch)
                found = _generated(model, plan, output, device, dtype, on_progress)
    except KeyboardInterrupt as stop:
        print(f"Stopped. What was measured is in {output}; the same command goes on from there.", file=sys.stderr)
        raise typer.Exit(130) from stop
    written = render.write(found, output)
    if as_json:
        print(json.dumps(found))
        return
    console = Console(highlight=False)
    for headline, table in render.tables(found):
        console.print(headline, style="bold")
        console.print(table, "")
    console.print(f"Wrote {', '.join(path.name for path in written)} in {output}", markup=False)


def _generated(model: str, plan: Plan, output: Path, device: str, dtype: str, on_progress: Any) -> dict[str, Any]:
    """Results on Sparsight's own tasks."""
    checkpoint = load_checkpoint(model)
    loaded = load_model(checkpoint, device, dtype)
    store = Store(output, {**_about(model, loaded), "seed": plan.seed})
    run(plan, loaded, checkpoint.processor, store, on_progress)
    return results(plan, store)


def _benchmarks(
    model: str,
    tasks: str,
    recipes: list[Recipe],
    limit: int,
    batch: int,
    include: Path | None,
    output: Path,
    device: str,
    dtype: str,
    on_progress: Any,
) -> dict[str, Any]:
    """Results on lmms-eval's tasks."""
    if tasks == "all":
        raise ValueError("lmms-eval has too many tasks for all of them: name some with --tasks, such as docvqa_val.")
    try:
        from sparsight.eval.lmms_harness import run_harness
        from sparsight.eval.lmms_model import LmmsModel
    except ImportError as error:
        raise ValueError(
            f"lmms-eval cannot be used: {str(error).rstrip('.')}. Install it with pip install 'sparsight[lmms-eval]'."
        ) from error
    loaded = LmmsModel(model, batch_size=batch, device=device, dtype=dtype)
    store = Store(output, {**_about(model, loaded.model), "examples": limit})
    return run_harness(tasks.split(","), recipes, loaded, store, limit, include, on_progress)


def _about(model: str, loaded: Any) -> dict[str, Any]:
    """What all figures of a run have in common."""
    return {
        "model": "the one that ships" if model == options.DEFAULT_MODEL else model,
        "weights": weights_digest(loaded),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


def _recipes(model: str, methods: str, budgets: str, heads: Path | None) -> list[Recipe]:
    """Every method at every budget; the full cache, with which all are compared, is measured anyway."""
    chosen = [name for name in names(methods, RECIPES) if name != "full"]
    made = [with_scores(recipe(name), model, heads) for name in chosen]
    # Of all methods, one that needs head scores is left out where there are none.
    lacking = [each for each in made if each.allocate == VisualHeads()] if methods == "all" else []
    return [replace(each, budget=budget) for each in made if each not in lacking for budget in budget_list(budgets)]
