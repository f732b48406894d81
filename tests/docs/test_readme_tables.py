import pytest

from docs import readme_tables
from sparsight.methods import RECIPES
from sparsight.models.families import FAMILIES


def test_the_readme_says_what_the_registries_say():
    text = readme_tables.README.read_text()
    assert readme_tables.with_tables(text) == text, "README.md is behind the registries: run make tables."


def test_every_method_and_family_has_a_row():
    text = readme_tables.README.read_text()
    assert all(f"\n| `{name}` | " in text for name in [*RECIPES, *FAMILIES])


def test_a_row_holds_paper_year_parts_and_a_line():
    (row,) = [line for line in readme_tables.methods_table().splitlines() if line.startswith("| `elastic`")]
    _, paper, *cells, summary = row.strip("| ").split(" | ")
    assert paper.endswith("(https://arxiv.org/abs/2407.18121)")
    assert cells == ["2024", "`accumulated`", "`uniform`", "`merge-nearest`", "`fixed-point`"]
    assert summary and "`" not in summary
    (row,) = [line for line in readme_tables.methods_table().splitlines() if line.startswith("| `random`")]
    assert row.startswith("| `random` |  |  | `random` |")


def test_what_stands_between_the_markers_is_rewritten_and_nothing_else(monkeypatch):
    monkeypatch.setattr(readme_tables, "PARTS", {"methods": lambda: "new"})
    old = "before\n<!-- methods: written by make tables -->\nold\n<!-- end -->\nafter"
    assert (
        readme_tables.with_tables(old) == "before\n<!-- methods: written by make tables -->\nnew\n<!-- end -->\nafter"
    )


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="has 0 parts between markers for 'methods'"):
        readme_tables.with_tables("no markers")
