"""The options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

from sparsight.compression.recipe import KINDS
from sparsight.models.loading import DTYPES
from sparsight.reader import model_path

DEFAULT_MODEL = str(model_path())
"""The model of a command that names none: the small one that ships."""

DEFAULT_METHOD = "vl-cache"
"""The method of a command that names none."""

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Folder or hub id of a vision-language model; the small one that ships if not given.",
        metavar="MODEL",
        show_default=False,
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", help="A picture: PNG, JPEG, WebP, GIF, BMP or TIFF. Repeat for several.", metavar="FILE"),
]
Prompt = Annotated[str, typer.Option("--prompt", help="The question.", metavar="TEXT")]
Method = Annotated[str, typer.Option(help="A method that `sparsight methods` lists.")]
Budget = Annotated[float, typer.Option(help="Fraction of the prompt's KV entries to keep, in (0, 1].")]
Score = Annotated[str | None, typer.Option(help=f"Another score for the method: {', '.join(KINDS['score'])}.")]
Allocate = Annotated[str | None, typer.Option(help=f"Another allocation: {', '.join(KINDS['allocate'])}.")]
Reduce = Annotated[str | None, typer.Option(help=f"Another reduction: {', '.join(KINDS['reduce'])}.")]
Decode = Annotated[str | None, typer.Option(help=f"Another decode rule: {', '.join(KINDS['decode'])}.")]
Heads = Annotated[
    Path | None,
    typer.Option(help="Head scores that `sparsight calibrate` wrote, for sparsemm.", metavar="FILE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="A torch device; auto is the first GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}.")]
MaxPixels = Annotated[int, typer.Option(help="Largest picture that is opened, in pixels.", min=1)]
