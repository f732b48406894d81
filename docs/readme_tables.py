"""README's tables of methods and model families, from the registries; ``python -m docs.readme_tables`` writes them."""

import inspect
import re
from pathlib import Path

from sparsight.cli import methods, models
from sparsight.compression.recipe import KINDS
from sparsight.methods import RECIPES
from sparsight.models.families import FAMILIES
from sparsight.models.layouts import Layout

README = Path(__file__).parents[1] / "README.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods_table() -> str:
    """Every method: paper, year, parts and a one-line summary."""
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


def families_table() -> str:
    """Every family: class, inputs, fields with vision tokens, layout, and layers that are not compressed."""
    rows = []
    for family in map(models.describe, FAMILIES.values()):
        tokens = ", ".join(f"`{field}`" for field in family["vision_tokens"])
        takes = "images, videos" if family["video"] else "images"
        rows.append(
            [
                f"`{family['model_type']}`",
                f"`{family['class']}`",
                takes,
                tokens,
                f"`{family['layout']}`",
                family["left_alone"],
            ]
        )
    return table(["model type", "class", "takes", "vision tokens", "seen as", "layers left alone"], rows)


def layouts() -> str:
    """The layouts with a one-line summary."""
    used: dict[Layout, None] = dict.fromkeys(family.layout for family in FAMILIES.values())
    return "\n".join(f"- `{layout.__name__}`: {_line(_summary(layout))}" for layout in used)


PARTS = {"methods": methods_table, "families": families_table, "layouts": layouts}


def with_tables(readme: str) -> str:
    """README with its generated parts replaced.

    Raises:
        ValueError: a part has no markers, or several pairs.
    """
    for name, write in PARTS.items():
        readme = replace_part(readme, name, "make tables", write())
    return readme


def replace_part(page: str, name: str, command: str, text: str) -> str:
    """A page with the part between the markers of ``name`` replaced; the markers name the ``command`` that does it.

    Raises:
        ValueError: the page has no such markers, or several pairs.
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
    """A summary without the leading name."""
    text = summary.partition(": ")[2] or summary
    return text[0].upper() + text[1:].rstrip(".")


def _summary(layout: Layout) -> str:
    """The first sentence of a layout's docstring, without its example."""
    first = inspect.cleandoc(layout.__doc__ or "").split("\n\n")[0]
    return re.sub(r" \([^)]*\)\.$", ".", " ".join(first.split()))


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
