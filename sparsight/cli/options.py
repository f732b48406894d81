"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from sparsight.compression.recipe import KINDS
from sparsight.models.loading import DTYPES
from sparsight.reader import model_path

DEFAULT_MODEL = str(model_path())
"""The model of a command without ``--model``: the small one that is bundled with the package."""

DEFAULT_METHOD = "vl-cache"
"""The method of a command without ``--method``."""

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Vision-language model: a folder or a Hugging Face Hub id. Default: the small bundled model.",
        metavar="MODEL",
        show_default=False,
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", help="Image file: PNG, JPEG, WebP, GIF, BMP or TIFF. Repeat the option for more.", metavar="FILE"
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", help="Question about the images.", metavar="TEXT")]
Method = Annotated[str, typer.Option(help="Compression method; `sparsight methods` lists them.", metavar="NAME")]
Budget = Annotated[float, typer.Option(help="Fraction of the prompt's KV entries to keep, in (0, 1].")]
Score = Annotated[
    str | None, typer.Option(help=f"Replace the method's score: {', '.join(KINDS['score'])}.", metavar="NAME")
]
Allocate = Annotated[
    str | None, typer.Option(help=f"Replace the method's allocation: {', '.join(KINDS['allocate'])}.", metavar="NAME")
]
Reduce = Annotated[
    str | None, typer.Option(help=f"Replace the method's reduction: {', '.join(KINDS['reduce'])}.", metavar="NAME")
]
Decode = Annotated[
    str | None, typer.Option(help=f"Replace the method's decode rule: {', '.join(KINDS['decode'])}.", metavar="NAME")
]
Heads = Annotated[
    Path | None,
    typer.Option(
        help="Head scores written by `sparsight calibrate`, needed by sparsemm for models other than the bundled one.",
        metavar="FILE",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum length of an answer in tokens.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the generated pages.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")]
Device = Annotated[
    str, typer.Option(help="torch device such as cpu or cuda:1; auto is the first GPU, or the CPU if there is none.")
]
Dtype = Annotated[
    str,
    typer.Option(help=f"dtype of the weights: {', '.join(DTYPES)}; auto is the checkpoint's own.", metavar="NAME"),
]
MaxPixels = Annotated[int, typer.Option(help="Refuse images with more pixels than this.", min=1)]
