"""Put a run of ``sparsight eval`` and one of ``sparsight analyze`` into docs/accuracy.md, between its two marks.

python -m benchmarks.accuracy runs/accuracy runs/analysis docs/accuracy.md
"""

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

BEGIN, END = "<!-- results: written by benchmarks/accuracy.py -->", "<!-- end of results -->"
RESULTS = ("results.json", "analysis.json")


def main(
    run: Annotated[Path, typer.Argument(help="Folder of sparsight eval.")],
    analysis: Annotated[Path, typer.Argument(help="Folder of sparsight analyze.")],
    page: Annotated[Path, typer.Argument(help="The page; pictures and numbers go to a folder of its name.")],
) -> None:
    """Write the tables into the page, and the pictures and numbers beside it."""
    beside = page.with_suffix("")
    beside.mkdir(exist_ok=True)
    for file in (*run.glob("*.png"), *analysis.glob("*.png"), run / RESULTS[0], analysis / RESULTS[1]):
        shutil.copy(file, beside)
    # Pictures stand beside the report, and in a folder beside the page.
    report = re.sub(r"\]\(([\w.]+\.png)\)", rf"]({beside.name}/\1)", (run / "report.md").read_text())
    picture = f"![Where attention goes]({beside.name}/analysis.png)"
    text = page.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}{BEGIN}\n\n{report.strip()}\n\n### Attention\n\n{picture}\n\n{after}")


if __name__ == "__main__":
    typer.run(main)
