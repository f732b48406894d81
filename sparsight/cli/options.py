"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from sparsight.cli.parsing import check_budget, check_budgets, check_method, check_one_of, check_part
from sparsight.reader import model_path

DEFAULT_MODEL = str(model_path())
"""The model of a command without ``--model``: the small one that is bundled with the package."""

DEFAULT_METHOD = "vl-cache"
"""The method of a command without ``--method``."""


def model_name(model: str) -> str:
    """What results call the model of ``--model``."""
    return "the bundled model" if model == DEFAULT_MODEL else model


METHOD, MODEL, OUTPUT = "Method", "Model", "Output"
"""Panels of ``--help``."""


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Those of :mod:`sparsight.models.loading`, which imports torch."""


def _part(role: str, name: str, note: str = "") -> typer.models.OptionInfo:
    return typer.Option(
        help=f"Replace the method's {name} by another method's; `sparsight methods` lists them.{note}",
        metavar="NAME",
        rich_help_panel=METHOD,
        callback=check_part(role),
    )


Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image", help="Image file: PNG, JPEG, WebP, GIF, BMP or TIFF. Repeat the option for more.", metavar="FILE"
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", help="Question about the images; - reads it from standard input.", metavar="TEXT"),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", help="Read the question from this UTF-8 text file.", metavar="FILE")
]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum length of an answer in tokens.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the generated pages.", min=0)]

Method = Annotated[
    str,
    typer.Option(
        help="Compression method; `sparsight methods` lists them.",
        metavar="NAME",
        rich_help_panel=METHOD,
        callback=check_method,
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the prompt's KV entries to keep, in (0, 1]; by default the method's own.",
        rich_help_panel=METHOD,
        callback=check_budget,
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        help="Fractions of the prompt's KV entries to keep, comma-separated.", metavar="NUMBERS", callback=check_budgets
    ),
]
Score = Annotated[str | None, _part("score", "score", " mixkv:post-vision is mixkv around post-vision.")]
Allocate = Annotated[str | None, _part("allocate", "allocation")]
Reduce = Annotated[str | None, _part("reduce", "reduction")]
Decode = Annotated[str | None, _part("decode", "decode rule")]
PrefillBound = Annotated[
    float | None,
    typer.Option(
        help="Bound each layer's entries during prefill to this many times its budget, at least 1.",
        rich_help_panel=METHOD,
    ),
]
HostMemory = Annotated[
    str,
    typer.Option(
        help="Keep the full keys and values of prompts in this much host memory, such as 8GiB: prompts that begin with "
        "the same text and images are computed from where they differ.",
        metavar="SIZE",
        rich_help_panel=METHOD,
    ),
]
Heads = Annotated[
    Path | None,
    typer.Option(
        help="Head scores from `sparsight calibrate`, which sparsemm needs for models other than the bundled one.",
        metavar="FILE",
        rich_help_panel=METHOD,
    ),
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Vision-language model: a folder or a Hugging Face Hub id; by default the small bundled model.",
        metavar="MODEL",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="torch device such as cpu or cuda:1; auto is the first GPU, or the CPU if there is none.",
        metavar="NAME",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="dtype of the weights: float32, bfloat16, float16, or auto for the checkpoint's own.",
        metavar="NAME",
        rich_help_panel=MODEL,
        callback=check_one_of("dtype", DTYPES),
    ),
]
MaxPixels = Annotated[int, typer.Option(help="Refuse images with more pixels than this.", min=1, rich_help_panel=MODEL)]

Force = Annotated[bool, typer.Option("--force", help="Replace existing results.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=OUTPUT)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on standard output instead of text.", rich_help_panel=OUTPUT),
]


def output(results: str, metavar: str, *, resumes: bool = False) -> typer.models.OptionInfo:
    """``--output`` of a command; all follow :mod:`sparsight.cli.output`."""
    rule = "a stopped run resumes there" if resumes else "existing results are kept unless --force is given"
    return typer.Option(
        help=f"{results}; missing folders are created, {rule}.", metavar=metavar, rich_help_panel=OUTPUT
    )
