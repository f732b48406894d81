import re

import pytest

from docs import tables
from sparsight.methods import RECIPES
from sparsight.models.families import FAMILIES


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_pages_say_what_the_registries_say(page):
    text = page.read_text()
    assert tables.written(text, tables.PAGES[page]) == text, f"{page.name} is behind the registries: run make tables."


@pytest.mark.parametrize(("page", "names"), [("methods.md", RECIPES), ("models.md", FAMILIES)])
def test_every_method_and_family_has_a_row(page, names):
    text = (tables.DOCS / page).read_text()
    assert all(f"\n| `{name}` | " in text for name in names)


def test_a_row_holds_paper_year_parts_and_a_line():
    (row,) = [line for line in tables.methods_table().splitlines() if line.startswith("| `elastic`")]
    assert row == (
        "| `elastic` | [Efficient Inference of Vision Instruction-Following Models with Elastic Cache, ECCV 2024]"
        "(https://arxiv.org/abs/2407.18121) | 2024 | `accumulated` | `uniform` | `merge-nearest` | `fixed-point` | "
        "Less important entries merge into the nearest important one; decoding drops at a fixed point |"
    )
    (row,) = [line for line in tables.methods_table().splitlines() if line.startswith("| `random`")]
    assert row.startswith("| `random` |  |  | `random` |")


def test_every_method_is_listed_once_by_its_requirements():
    lines = tables.requirements_table().splitlines()[2:]
    assert sorted(name for line in lines for name in re.findall("`(.+?)`", line)) == sorted(RECIPES)
    (row,) = [line for line in lines if "`kvzip`" in line]
    assert row.endswith("observes no queries, and processes the prompt twice |  |  | `kvzip` |")


def test_what_stands_between_the_markers_is_rewritten_and_nothing_else():
    old = "before\n<!-- methods: written by make tables -->\nold\n<!-- end -->\nafter"
    new = tables.written(old, {"methods": lambda: "new"})
    assert new == "before\n<!-- methods: written by make tables -->\nnew\n<!-- end -->\nafter"


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="has 0 parts between markers for 'methods'"):
        tables.written("no markers", {"methods": lambda: "new"})
