"""``sparsight methods``: the compression methods by name."""

import inspect
import json
import re
from typing import Any

from rich.table import Table

from sparsight.cli import options
from sparsight.cli.terminal import show


def main(as_json: options.Json = False) -> None:
    """List the compression methods with their parts, default budgets and papers."""
    from sparsight.compression.recipe import KINDS
    from sparsight.methods import RECIPES

    listing = [describe(name) for name in RECIPES]
    if as_json:
        print(json.dumps(listing))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("method", *KINDS, "budget"):
        table.add_column(column, header_style="bold cyan")
    for method in listing:
        table.add_row(method["name"], *(method[role]["kind"] for role in KINDS), f"{method['budget'] * 100:.3g}%")
    show(table)
    for method in listing:
        show(f"\n{method['name']}: {method['citation']}")


def describe(name: str) -> dict[str, Any]:
    """A method as plain data: parts and default numbers, and summary, citation and year from its docstring."""
    from sparsight.methods import RECIPES

    summary, paragraph = inspect.cleandoc(RECIPES[name].__doc__ or "\n\n").split("\n\n")[:2]
    citation = _reference(paragraph)
    arxiv = re.search(r"arXiv (\d\d)(\d\d\.\d+)$", citation)
    return {
        **json.loads(RECIPES[name]().to_json()),
        "summary": " ".join(summary.split()),
        "citation": citation,
        "arxiv": arxiv and arxiv[1] + arxiv[2],
        # An arXiv number starts with the year.
        "year": arxiv and f"20{arxiv[1]}",
    }


def _reference(paragraph: str) -> str:
    """The paper that a docstring's second paragraph starts with, up to its arXiv number."""
    line = " ".join(paragraph.split())
    match = re.match(r".*?arXiv [\d.]+\d", line)
    return match[0] if match else line
