"""Write the results of ``sparsight eval`` and ``sparsight analyze`` to docs/accuracy.md, between its two markers.

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
    page: Annotated[Path, typer.Argument(help="The page; figures and results go to a folder of its name.")],
) -> None:
    """Write the tables to the page, and copy figures and results to the folder beside it."""
    beside = page.with_suffix("")
    beside.mkdir(exist_ok=True)
    for file in (*run.glob("*.png"), *analysis.glob("*.png"), run / RESULTS[0], analysis / RESULTS[1]):
        shutil.copy(file, beside)
    # Figures are beside the report, and in a folder beside the page.
    report = re.sub(r"\]\(([\w.]+\.png)\)", rf"]({beside.name}/\1)", (run / "report.md").read_text())
    figure = f"![Where attention goes]({beside.name}/analysis.png)"
    text = page.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}{BEGIN}\n\n{report.strip()}\n\n### Attention\n\n{figure}\n\n{after}")


if __name__ == "__main__":
    typer.run(main)
