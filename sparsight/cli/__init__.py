"""The command line: ``sparsight`` and its commands."""

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
    """Run the command line on ``arguments``, by default the process's, and exit: 2 after an error of the user's."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # A picture over the limit is reported once, by Sparsight.
    warnings.simplefilter("ignore", DecompressionBombWarning)
    try:
        app(arguments)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
