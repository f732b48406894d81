"""The tables of methods.md and models.md, from the registries: ``python -m docs.tables`` rewrites them."""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sparsight.cli import methods, models
from sparsight.compression.recipe import KINDS
from sparsight.methods import RECIPES
from sparsight.models.families import FAMILIES
from sparsight.models.layouts import Layout

DOCS = Path(__file__).parent


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods_table() -> str:
    """Every recipe: its paper and year, its parts, and what it does in one line."""
    rows = []
    for name in RECIPES:
        method = methods.describe(name)
        parts = [f"`{method[role]['kind']}`" for role in KINDS]
        rows.append(
            [
                f"`{name}`",
                _paper(method["citation"], method["arxiv"]),
                method["year"] or "",
                *parts,
                _line(method["summary"]),
            ]
        )
    return table(["method", "paper", "year", *KINDS, ""], rows)


def requirements_table() -> str:
    """The recipes by what they need and what they add to the prefill, and by how far it can be bounded."""
    rows = []
    for (need, cost), group in methods.groups([methods.describe(name) for name in RECIPES]).items():
        bounded = [
            ", ".join(f"`{method['name']}`" for method in group if method["prefill"]["bounded"] == how)
            for how in ("chunks", "at once", "no")
        ]
        rows.append([need, cost, *bounded])
    return table(["needs", "the prefill", "bounded, also in chunks", "bounded, at once", "not bounded"], rows)


def families_table() -> str:
    """Every family: its class, inputs, vision tokens, layout and uncompressed layers."""
    rows = []
    for family in map(models.describe, FAMILIES.values()):
        tokens = ", ".join(f"`{field}`" for field in family["vision_tokens"])
        inputs = "images, videos" if family["video"] else "images"
        rows.append(
            [
                f"`{family['model_type']}`",
                f"`{family['class']}`",
                inputs,
                tokens,
                f"`{family['layout']}`",
                family["left_alone"],
            ]
        )
    return table(["model type", "class", "inputs", "vision tokens", "layout", "uncompressed layers"], rows)


def layouts() -> str:
    """The layouts that families use, each with the first sentence of its docstring."""
    used: dict[Layout, None] = dict.fromkeys(family.layout for family in FAMILIES.values())
    return "\n".join(f"- `{layout.__name__}`: {_line(_summary(layout))}" for layout in used)


PAGES = {
    DOCS / "methods.md": {"methods": methods_table, "requirements": requirements_table},
    DOCS / "models.md": {"families": families_table, "layouts": layouts},
}
"""The parts of each page."""


def written(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page's text with its parts between their markers as the registries say.

    Raises:
        ValueError: a part has no markers.
    """
    for name, write in parts.items():
        text = replace_part(text, name, "make tables", write())
    return text


def replace_part(page: str, name: str, command: str, text: str) -> str:
    """A page with ``text`` as the part between the markers of ``name``, which ``command`` writes.

    Raises:
        ValueError: the part has no markers, or several.
    """
    marked = re.compile(rf"(<!-- {name}: written by {command} -->\n).*?(<!-- end -->)", re.DOTALL)
    page, found = marked.subn(lambda part: f"{part[1]}{text}\n{part[2]}", page)
    if found != 1:
        raise ValueError(f"The page has {found} parts between markers for {name!r}, not one.")
    return page


def _paper(citation: str, arxiv: str | None) -> str:
    """A citation's title and venue, as a link."""
    if arxiv is None:
        return ""
    title = citation.partition(": ")[2].removesuffix(f", arXiv {arxiv}")
    return f"[{title}](https://arxiv.org/abs/{arxiv})"


def _line(summary: str) -> str:
    """What a summary says after the name."""
    text = summary.partition(": ")[2] or summary
    return text[0].upper() + text[1:].rstrip(".")


def _summary(layout: Layout) -> str:
    """The first sentence of a layout's docstring, without its examples."""
    first = inspect.cleandoc(layout.__doc__ or "").split("\n\n")[0]
    return re.sub(r" \([^)]*\)\.$", ".", " ".join(first.split()))


if __name__ == "__main__":
    for page, parts in PAGES.items():
        page.write_text(written(page.read_text(), parts))
