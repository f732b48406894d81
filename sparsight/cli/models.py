"""``sparsight models``: the model families whose vision tokens are known."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsight.cli import options
from sparsight.models.families import CROSS_ATTENTION, FAMILIES, Family

SUFFIX = "ForConditionalGeneration"


def models(as_json: options.Json = False) -> None:
    """List the model families."""
    listed = [describe(family) for family in FAMILIES.values()]
    if as_json:
        print(json.dumps(listed))
        return
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("model type", "class", "video", "seen as", "left alone"):
        shown.add_column(column, header_style="bold cyan")
    for family in listed:
        shown.add_row(
            family["model_type"],
            family["class"].removesuffix(SUFFIX),
            "yes" if family["video"] else "",
            family["layout"].replace("_", " "),
            family["left_alone"],
        )
    console = Console(highlight=False)
    console.print(shown)
    console.print(
        f"\nClasses end in {SUFFIX}. Layers left alone hold a bounded state already. From Python, models of text alone "
        f"with layers of full attention work too, such as Llama, Qwen3 and Mistral. Not supported: "
        f"{', '.join(CROSS_ATTENTION)}, whose text attends to pictures through layers of their own."
    )


def describe(family: Family) -> dict[str, Any]:
    """A family's facts as plain data."""
    return {
        "model_type": family.model_type,
        "class": family.model_class,
        "vision_tokens": list(family.token_fields),
        "video": family.video,
        "layout": family.layout.__name__,
        "left_alone": family.uncompressed_layers,
    }
