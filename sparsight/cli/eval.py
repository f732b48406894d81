"""``sparsight eval``: accuracy of methods at several budgets, measured on tasks."""

from __future__ import annotations

import json
import platform
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from sparsight.cli import options
from sparsight.cli.output import check_folder
from sparsight.cli.papers import show_paper
from sparsight.cli.parsing import budget_list, check_methods, check_one_of, names
from sparsight.cli.progress import progress
from sparsight.cli.terminal import show, stopped
from sparsight.eval.papers import PAPERS
from sparsight.utils.text import escape

if TYPE_CHECKING:
    from sparsight.compression.recipe import Recipe
    from sparsight.eval.evaluator import EvaluationConfig, OnProgress
    from sparsight.eval.kvpress_methods import KvpressMethod
    from sparsight.models.loading import Checkpoint

TASKS = ("look-up", "conversation", "transcribe", "two-pages", "growing")
TEXT_TASKS = ("continuation", "retrieval", "few-shot")
"""The names of what :mod:`sparsight.eval.tasks` has, for ``--help``, which does not import it."""

HARNESSES = ("sparsight", "lmms-eval")
BUDGETS = "0.01,0.05,0.1,0.2,0.4,1.0"
LONG_SECONDS = 120
"""A run that takes longer says so before it starts."""


def main(
    context: typer.Context,
    tasks: Annotated[
        str,
        typer.Option(
            help=f"Tasks: {', '.join(TASKS)}, or all; look-up:64 sets a task's size. Of models without images: "
            f"{', '.join(TEXT_TASKS)}.",
            metavar="NAMES",
        ),
    ] = "all",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, comma-separated, or all; `sparsight methods` lists them.",
            metavar="NAMES",
            callback=check_methods,
        ),
    ] = "all",
    budgets: options.Budgets = BUDGETS,
    heads: options.Heads = None,
    limit: Annotated[int, typer.Option(help="Number of examples of each task.", min=2)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the generated examples.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Examples per batch; lower it for large models.", min=1)] = 16,
    passage_as_vision: Annotated[
        bool,
        typer.Option(
            "--passage-as-vision",
            help="Models without images: count the tokens of a task's passage as vision tokens.",
        ),
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option(
            help="host keeps the full cache in host memory: a new turn of a conversation attends to it, and what is "
            "kept is chosen again.",
            metavar="NAME",
            callback=check_one_of("value of --keep", ("host",)),
        ),
    ] = None,
    harness: Annotated[
        str,
        typer.Option(
            help="sparsight for its own tasks, lmms-eval for public benchmarks.",
            metavar="NAME",
            callback=check_one_of("harness", HARNESSES),
        ),
    ] = HARNESSES[0],
    include: Annotated[
        Path | None, typer.Option(help="Folder with additional tasks in lmms-eval's format.", metavar="DIR")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Models without images: kvpress adds its methods on the same prompts.",
            metavar="NAME",
            callback=check_one_of("value of --against", ["kvpress"]),
        ),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            help=f"Only show a paper's tables ({', '.join(PAPERS)}), all or those of --model, beside the results of "
            "runs in the folders of --output, by default runs/PAPER.",
            metavar="NAME",
            callback=check_one_of("paper", PAPERS),
        ),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path | None, options.output("Folder of the run, by default runs/eval", "DIR", resumes=True)
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure how much of a model's accuracy methods keep at several budgets; a stopped run resumes."""
    if paper is not None:
        _check_paper(context)
        shown = None if model == options.DEFAULT_MODEL else model
        show_paper(paper, shown, output or Path("runs") / paper, as_json=as_json)
        return
    from sparsight.eval import render
    from sparsight.eval import tasks as tasks_module
    from sparsight.eval.evaluator import EvaluationConfig
    from sparsight.eval.metrics import check_installed
    from sparsight.models.loading import load_checkpoint

    if keep and harness != HARNESSES[0]:
        raise ValueError("--keep is for conversations, of which lmms-eval has none: leave it out.")
    recipes = _recipes(model, methods, budgets, heads)
    output = output or Path("runs/eval")
    check_folder(output, "results.json", replace=True)
    try:
        with progress("Evaluating", quiet=quiet or as_json) as on_progress:
            if harness == "lmms-eval":
                report = _benchmarks(model, tasks, recipes, limit, batch, include, output, device, dtype, on_progress)
            else:
                checkpoint = load_checkpoint(model, text=True)
                known = tasks_module.TEXT_TASKS if checkpoint.text_only else tasks_module.TASKS
                if (passage_as_vision or against) and not checkpoint.text_only:
                    raise ValueError("--passage-as-vision and --against are for models without images.")
                chosen = [tasks_module.task(name, known) for name in names(tasks, known)]
                check_installed({metric for task in chosen for metric in task.metrics})
                with ExitStack() as stack:
                    others = _kvpress(checkpoint, budgets, device, dtype, stack) if against else []
                    config = EvaluationConfig(chosen, [*recipes, *others], limit, seed, batch, passage_as_vision, keep)
                    report = _generated(model, checkpoint, config, output, device, dtype, on_progress)
    except KeyboardInterrupt as stop:
        raise stopped(output) from stop
    written = render.write(report, output)
    if as_json:
        print(json.dumps(report))
        return
    for headline, table in render.tables(report):
        show(Text(headline, "bold"), table, "")
    print(f"Wrote {', '.join(path.name for path in written)} in {escape(output)}")


def _check_paper(context: typer.Context) -> None:
    """Raise ValueError if options are given that a paper's tables do not use."""
    used = "paper", "model", "output", "quiet", "as_json"
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name not in used
        and (source := context.get_parameter_source(parameter.name or "")) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise ValueError(f"--paper only shows tables, of --model and --output: leave out {', '.join(given)}.")


def _kvpress(checkpoint: Checkpoint, budgets: str, device: str, dtype: str, stack: ExitStack) -> list[KvpressMethod]:
    """Kvpress's methods at every budget below 1, with a process that ends with the stack."""
    from sparsight.bench.kvpress import CannotRun, Kvpress
    from sparsight.bench.kvpress_worker import PRESSES
    from sparsight.eval.kvpress_methods import KvpressMethod
    from sparsight.models.loading import find_device

    try:
        process = stack.enter_context(Kvpress.of(checkpoint.name, dtype, find_device(device)))
    except CannotRun as error:
        raise ValueError(f"{error}.") from error
    below = [budget for budget in budget_list(budgets) if budget < 1]
    return [KvpressMethod(press, budget, process) for press in PRESSES for budget in below]


def _generated(
    model: str,
    checkpoint: Checkpoint,
    config: EvaluationConfig,
    output: Path,
    device: str,
    dtype: str,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Results on Sparsight's own tasks."""
    from sparsight.eval.aggregation import aggregate
    from sparsight.eval.evaluator import measure_pace, remaining_seconds, results_done, run_evaluation
    from sparsight.eval.result_store import ResultStore
    from sparsight.models.loading import load_model

    on_progress("Loading the model", 0, config.total)
    loaded = load_model(checkpoint, device, dtype)
    about = {**_about(model, loaded), "seed": config.seed, "keep": config.keep}
    if checkpoint.text_only:
        # The text differs between versions of Python.
        about |= {"passage": "vision" if config.passage_as_vision else "text", "python": platform.python_version()}
    with ResultStore(output, about) as store:
        on_progress("Estimating the time", results_done(config, store), config.total)
        measure_pace(config, loaded, checkpoint.processor, store)
        seconds, missing = remaining_seconds(config, store), config.total - results_done(config, store)
        if seconds > LONG_SECONDS:
            print(
                f"{missing:,} results to measure, about {_duration(seconds)}. Fewer --tasks, --methods or --budgets "
                "or a lower --limit take less time; an interrupted run can be resumed.",
                file=sys.stderr,
            )
        run_evaluation(config, loaded, checkpoint.processor, store, on_progress)
        return aggregate(config, store)


def _duration(seconds: float) -> str:
    """Hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


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
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Results on lmms-eval's tasks."""
    from sparsight.eval.result_store import ResultStore

    if tasks == "all":
        raise ValueError("lmms-eval has too many tasks to run all of them: name some with --tasks, such as docvqa_val.")
    try:
        from sparsight.eval.lmms_harness import run_harness
        from sparsight.eval.lmms_model import LmmsModel
    except ImportError as error:
        raise ValueError(
            f"lmms-eval cannot be used: {str(error).rstrip('.')}. Install it with pip install 'sparsight[lmms-eval]'."
        ) from error
    loaded = LmmsModel(model, batch_size=batch, device=device, dtype=dtype)
    with ResultStore(output, {**_about(model, loaded.model), "examples": limit}) as store:
        return run_harness(tasks.split(","), recipes, loaded, store, limit, include, on_progress)


def _about(model: str, loaded: Any) -> dict[str, Any]:
    """What all results of a run have in common."""
    from sparsight.eval.evaluator import weights_digest

    return {
        "model": options.model_name(model),
        "weights": weights_digest(loaded),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


def _recipes(model: str, methods: str, budgets: str, heads: Path | None) -> list[Recipe]:
    """Every method at every budget, except the full cache, which is always measured as the baseline."""
    from sparsight.cli.recipe_options import with_scores
    from sparsight.compression import VisualHeads
    from sparsight.methods import RECIPES, recipe

    compressing = [name for name in names(methods, RECIPES) if name != "full"]
    recipes = [with_scores(recipe(name), model, heads) for name in compressing]
    # `all` leaves out methods whose head scores are missing.
    lacking = [each for each in recipes if each.allocate == VisualHeads()] if methods == "all" else []
    return [replace(each, budget=budget) for each in recipes if each not in lacking for budget in budget_list(budgets)]
