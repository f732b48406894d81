"""``sparsight models``: the supported model families, and models that can be installed by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparsight.cli import options
from sparsight.cli.parsing import check_one_of
from sparsight.cli.terminal import show
from sparsight.utils.text import escape

if TYPE_CHECKING:
    from sparsight.models.families import Family

INSTALLABLE = ("smollm2",)
"""The names that :mod:`sparsight.models.install` has, which imports transformers."""

SUFFIX = "ForConditionalGeneration"


def main(
    install: Annotated[
        str | None,
        typer.Option(
            help=f"Instead install a language model for `sparsight eval`: {', '.join(INSTALLABLE)}.",
            metavar="NAME",
            callback=check_one_of("model", INSTALLABLE),
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the supported model families."""
    from sparsight.models.families import CROSS_ATTENTION, FAMILIES

    if install is not None:
        from sparsight.models.install import install as install_model

        folder = str(install_model(install))
        print(json.dumps({"model": install, "folder": folder}) if as_json else f"{install} is in {escape(folder)}")
        return
    families = [describe(family) for family in FAMILIES.values()]
    if as_json:
        print(json.dumps(families))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("model type", "class", "video", "layout", "uncompressed"):
        table.add_column(column, header_style="bold cyan")
    for family in families:
        table.add_row(
            family["model_type"],
            family["class"].removesuffix(SUFFIX),
            "yes" if family["video"] else "",
            family["layout"].replace("_", " "),
            family["left_alone"],
        )
    show(table)
    show(
        f"\nClass names end in {SUFFIX}. Uncompressed layers hold a state of bounded size already. From Python, "
        "text-only models with full attention, such as Llama, Qwen3 and Mistral, are supported too. Not supported: "
        f"{', '.join(CROSS_ATTENTION)}, whose text attends to images through cross-attention layers."
    )


def describe(family: Family) -> dict[str, Any]:
    """A model family as plain data."""
    return {
        "model_type": family.model_type,
        "class": family.model_class,
        "vision_tokens": list(family.token_fields),
        "video": family.video,
        "layout": family.layout.__name__,
        "left_alone": family.uncompressed_layers,
    }
