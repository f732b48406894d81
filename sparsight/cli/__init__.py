"""The ``sparsight`` command and its subcommands."""

import sys
import warnings
from collections.abc import Sequence

import typer
from PIL.Image import DecompressionBombWarning
from transformers.utils import logging

from sparsight.cli import analyze, batch, bench, calibrate, eval, generate, inspect, methods, models

app = typer.Typer(
    help="Compressed KV caches for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("batch")(batch.batch)
app.command("eval")(eval.evaluate)
app.command("analyze")(analyze.analyze_model)
app.command("bench")(bench.bench)
app.command("methods")(methods.methods)
app.command("models")(models.models)
app.command("calibrate")(calibrate.calibrate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on ``arguments``, by default ``sys.argv[1:]``, and exit: with 2 after a user error."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Sparsight itself reports images over the limit.
    warnings.simplefilter("ignore", DecompressionBombWarning)
    try:
        app(arguments)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
