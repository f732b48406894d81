"""The accuracy page gets the tables and figures of a run, and nothing else changes."""

from pathlib import Path

from benchmarks.accuracy import BEGIN, END, main


def test_the_results_replace_the_old_ones_between_the_marks(tmp_path: Path) -> None:
    run, analysis, page = tmp_path / "run", tmp_path / "analysis", tmp_path / "page.md"
    run.mkdir(), analysis.mkdir()
    (run / "report.md").write_text("![A curve](accuracy.png)\n\n| a | b |\n")
    (run / "accuracy.png").write_bytes(b"1")
    (run / "results.json").write_text("{}")
    (run / "cells.jsonl").write_text("large")
    (analysis / "analysis.png").write_bytes(b"2")
    (analysis / "analysis.json").write_text("[]")
    page.write_text(f"# Accuracy\n\nprose\n\n{BEGIN}\n\nold\n\n{END}\n\nmore prose\n")
    for _ in range(2):
        main(run, analysis, page)
        assert page.read_text() == (
            f"# Accuracy\n\nprose\n\n{BEGIN}\n\n![A curve](page/accuracy.png)\n\n| a | b |\n\n"
            f"### Attention\n\n![Where attention goes](page/analysis.png)\n\n{END}\n\nmore prose\n"
        )
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == [
        "accuracy.png", "analysis.json", "analysis.png", "results.json",
    ]  # fmt: skip


def test_the_page_has_its_marks() -> None:
    text = (Path(__file__).parents[2] / "docs" / "accuracy.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)
