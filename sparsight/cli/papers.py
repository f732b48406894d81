"""``sparsight eval --paper``: a paper's own tables beside what was measured with Sparsight."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsight.cli.terminal import show
from sparsight.eval.papers import cells, checkpoints, command, load_paper, read_measured
from sparsight.utils.text import escape


def show_paper(name: str, checkpoint: str | None, folder: Path, *, as_json: bool) -> None:
    """Print a paper's tables, those of one checkpoint if given, with what the runs in ``folder`` have measured.

    Raises:
        ValueError: there are no tables of such a paper, or they have no such checkpoint.
    """
    paper = load_paper(name)
    if checkpoint is not None and checkpoint not in checkpoints(paper):
        raise ValueError(f"The tables have no model {checkpoint!r}, only {', '.join(checkpoints(paper))}.")
    chosen = [cell for cell in cells(paper, read_measured(folder)) if checkpoint in (None, cell["checkpoint"])]
    commands = {each: command(paper, each, folder) for each in dict.fromkeys(cell["checkpoint"] for cell in chosen)}
    if as_json:
        print(json.dumps({"cells": chosen, "commands": commands}))
        return
    show(f"{paper['title']}, arXiv {paper['arxiv']}. {paper['setting']}\n")
    for (table, model), own in groupby(chosen, lambda cell: (cell["table"], cell["model"])):
        show(Text(f"Table {table}, {model}", "bold"), _table(list(own)), "")
    print("The columns `ours` are measured by:", *map(escape, commands.values()), sep="\n\n")


def _table(own: list[dict[str, Any]]) -> Table:
    """One model's cells: a row for each method and budget, two columns for each benchmark."""
    values = {(cell["method"], cell["budget"], cell["benchmark"]): cell for cell in own}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("method", "budget"):
        table.add_column(column, header_style="bold cyan")
    benchmarks = dict.fromkeys(cell["benchmark"] for cell in own)
    for benchmark in benchmarks:
        for column in (benchmark, "ours"):
            table.add_column(column, justify="right", header_style="bold cyan")
    for method, budget in dict.fromkeys((cell["method"], cell["budget"]) for cell in own):
        row = [values[method, budget, benchmark] for benchmark in benchmarks]
        numbers = [number for cell in row for number in (cell["value"], cell["ours"])]
        table.add_row(method, f"{budget * 100:.3g} %", *("" if each is None else f"{each:.1f}" for each in numbers))
    return table
