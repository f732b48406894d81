"""The accuracy page and those beside it hold the results, and nothing else changes."""

import shutil
from pathlib import Path

import pytest

from benchmarks.accuracy import BEGIN, END, main, pages

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"


def test_the_pages_say_what_the_results_say() -> None:
    texts = pages(PAGE)
    assert {path for path in texts if path != PAGE} == set((PAGE.parent / "accuracy").rglob("*.md"))
    for path, text in texts.items():
        assert path.read_text() == text, f"{path.name} is behind the results: python -m benchmarks.accuracy {PAGE}"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page beside results; its folder also has a page of a task that is no longer measured."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("results.json", "accuracy.png"):
        shutil.copy(PAGE.parent / "accuracy" / name, folder)
    (folder / "look-up-8.md").write_text("old")
    (tmp_path / "page.md").write_text(f"# Accuracy\n\nprose\n\n{BEGIN}\n\nold\n\n{END}\n\nmore prose\n")
    return tmp_path / "page.md"


def test_the_results_replace_the_old_ones_between_the_marks(page: Path) -> None:
    main(page)
    once = page.read_text()
    main(page)
    assert page.read_text() == once
    assert once.startswith(f"# Accuracy\n\nprose\n\n{BEGIN}\n\nModel ")
    assert once.endswith(f"![Where attention goes](page/analysis.png)\n\n{END}\n\nmore prose\n")
    # Only figures that exist.
    assert "](page/accuracy.png)" in once and "perplexity.png" not in once
    tasks = ["conversation-4", "growing-64", "look-up-32", "transcribe-4", "two-pages-16"]
    assert sorted(file.stem for file in page.with_suffix("").glob("*.md")) == tasks


def test_the_page_has_every_method_at_one_budget_and_the_tasks_pages_all_budgets(page: Path) -> None:
    main(page)
    # 19 and 35 of 100 pages were answered right.
    assert "| `vl-cache` | 19.0 (12.0-27.0) | " in page.read_text()
    assert "| full cache | 100.0 (100.0-100.0) | " in page.read_text()
    own = (page.with_suffix("") / "look-up-32.md").read_text()
    assert own.startswith("# look-up:32\n\nOne record of a page.")
    assert "| 19.0 (12.0-27.0) | 35.0 (26.0-44.0) | " in own
    assert "two-pages" not in own
