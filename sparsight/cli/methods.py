"""``sparsight methods``: the compression methods by name."""

import inspect
import json
import re
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsight.cli import options
from sparsight.cli.terminal import show

NEEDS = {"question": "the question after the image", "calibration": "head scores of the model"}
QUERIES = {"none": "observes no queries", "last": "observes the last queries", "all": "observes every query"}
BOUNDED = (
    "bounded: whether --prefill-bound works for prompts in chunks, for prompts that are processed at once, or not. "
    "Without the option every method takes chunks."
)


def main(as_json: options.Json = False) -> None:
    """List the compression methods by what they need and what they add to the prefill."""
    from sparsight.compression.recipe import KINDS
    from sparsight.methods import RECIPES

    listing = [describe(name) for name in RECIPES]
    if as_json:
        print(json.dumps(listing))
        return
    for (need, cost), methods in groups(listing).items():
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("method", *KINDS, "bounded"):
            table.add_column(column, header_style="bold cyan")
        for method in methods:
            table.add_row(method["name"], *(method[role]["kind"] for role in KINDS), method["prefill"]["bounded"])
        show(Text(f"Needs {need}; the prefill {cost}", "bold"), table, "")
    show(BOUNDED)
    for method in listing:
        show(f"\n{method['name']}: {method['citation']}")


def groups(listing: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Methods, as :func:`describe` returns them, by what they need and what they add to the prefill, in words."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for method in sorted(listing, key=lambda method: len(method["needs"])):
        need = " and ".join(NEEDS[name] for name in method["needs"]) or "nothing but the prompt"
        prefill = method["prefill"]
        cost = QUERIES[prefill["queries"]] + (", and processes the prompt twice" if prefill["passes"] == 2 else "")
        found.setdefault((need, cost), []).append(method)
    return found


def describe(name: str) -> dict[str, Any]:
    """A method as plain data.

    Its parts and default numbers, what it needs, what it adds to the prefill, and summary, citation and year from its
    docstring.
    """
    from sparsight.compression.requirements import needs, observed_queries
    from sparsight.methods import RECIPES

    recipe = RECIPES[name]()
    summary, paragraph = inspect.cleandoc(RECIPES[name].__doc__ or "\n\n").split("\n\n")[:2]
    citation = _reference(paragraph)
    arxiv = re.search(r"arXiv (\d\d)(\d\d\.\d+)$", citation)
    return {
        **json.loads(recipe.to_json()),
        "needs": needs(recipe),
        "prefill": {
            "queries": observed_queries(recipe),
            "passes": 2 if recipe.score.needs_replay else 1,
            "bounded": _bounded(recipe),
        },
        "summary": " ".join(summary.split()),
        "citation": citation,
        "arxiv": arxiv and arxiv[1] + arxiv[2],
        # An arXiv number starts with the year.
        "year": arxiv and f"20{arxiv[1]}",
    }


def _bounded(recipe: Any) -> str:
    """The prompts whose prefill can be bounded: those in ``chunks``, or only those processed ``at once``, or ``no``."""
    from sparsight.cache.bounded_prefill import check_bound, check_cuts

    try:
        check_bound(1, recipe)
    except ValueError:
        return "no"
    try:
        check_cuts(recipe, causal=True)
    except ValueError:
        return "at once"
    return "chunks"


def _reference(paragraph: str) -> str:
    """The paper that a docstring's second paragraph starts with, up to its arXiv number."""
    line = " ".join(paragraph.split())
    match = re.match(r".*?arXiv [\d.]+\d", line)
    return match[0] if match else line
