"""The subcommands, each imported when it is invoked, and torch and transformers only when it runs.

Their imports take seconds, which ``--help`` and a mistyped option should not.
"""

import errno
import signal
import warnings
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import sparsight
from sparsight.cli import set_stop_signals

COMMANDS = {
    "generate": "Answer a question about images with a compressed KV cache.",
    "chat": "Chat about images with a model or a server.",
    "inspect": "Plot which image patches stay in the KV cache.",
    "batch": "Answer questions about many images.",
    "serve": "Serve a model to OpenAI's clients.",
    "eval": "Measure how much of a model's accuracy methods keep.",
    "analyze": "Measure what a model attends to, and how well scores predict it.",
    "bench": "Measure the speed and memory of methods.",
    "calibrate": "Measure a model's head scores, for the method sparsemm.",
    "methods": "List the compression methods.",
    "models": "List the supported model families.",
}
"""The subcommands, each the function ``main`` of the module of its name, and their lines in ``sparsight --help``."""


class LazyGroup(TyperGroup):
    """A group that lists placeholders of its commands, and loads the one that is invoked."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The invoked command, its name and its arguments."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, load(name) if name is not None else placeholder, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the invoked command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            # typer exits silently after EPIPE; any other number reaches main().
            raise OSError(errno.EIO, error.strerror) from error


class Command(TyperCommand):
    """A subcommand that imports the heavy libraries after its options have been parsed."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        _load_libraries()
        # From here on a command may have results to save.
        set_stop_signals(signal.default_int_handler)
        return super().invoke(ctx)


def load(name: str) -> Any:
    """Import a subcommand, whose module imports torch and transformers in functions only."""
    single = typer.Typer(add_completion=False)
    single.command(name, cls=Command)(import_module(f"sparsight.cli.{name}").main)
    return typer.main.get_command(single)


def _load_libraries() -> None:
    """Import torch and transformers, and leave reporting to Sparsight.

    transformers shows no progress bars, and there is one message about an image over the limit.
    """
    # Imported here and not by the command: a signal during the import must still end the process.
    import torch  # noqa: F401
    from PIL.Image import DecompressionBombWarning
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", DecompressionBombWarning)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"sparsight {sparsight.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Compressed KV caches for vision-language models.

    Exit codes: 1 failed rows or unwritable output, 2 wrong input, 130 stopped.
    """
