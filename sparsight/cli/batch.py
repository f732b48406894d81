"""``sparsight batch``: answer many questions about images into a file; a stopped run resumes."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsight.batch_inference.job import Job, results
from sparsight.batch_inference.output import Output, Result
from sparsight.batch_inference.ray_data import Cluster, results_on
from sparsight.batch_inference.rows import read_ids, read_rows
from sparsight.cache.report import mebibytes
from sparsight.cli import options
from sparsight.cli.output import check_file
from sparsight.cli.recipe_options import recipe_from_options
from sparsight.cli.session import read_prompt
from sparsight.cli.terminal import console, printable, show, stopped
from sparsight.models.images import MAX_PIXELS
from sparsight.models.loading import load_checkpoint


def main(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="JSON lines, a folder of images, or Parquet with encoded images.")
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="JSON-lines or .parquet file to write; missing folders are created, a stopped run resumes there.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Question for the rows that have none of their own; - reads it from standard input.", metavar="TEXT"
        ),
    ] = None,
    prompt_file: options.PromptFile = None,
    max_new_tokens: options.MaxNewTokens = 100,
    method: options.Method = options.DEFAULT_METHOD,
    budget: options.Budget = None,
    score: options.Score = None,
    allocate: options.Allocate = None,
    reduce: options.Reduce = None,
    decode: options.Decode = None,
    heads: options.Heads = None,
    batch_size: Annotated[
        str, typer.Option(help="Sequences decoded together; auto is as many as fit in memory.", metavar="NUMBER")
    ] = "auto",
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: its address, auto, or local to start one.", metavar="ADDRESS"),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Model replicas on the Ray cluster.", min=1)] = 1,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(help="GPUs of each replica; by default one if the cluster has any.", min=0, show_default=False),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_pixels: options.MaxPixels = MAX_PIXELS,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Answer questions about many images; exits with 1 if some rows failed."""
    started = time.perf_counter()
    parts = {"score": score, "allocate": allocate, "reduce": reduce, "decode": decode}
    recipe = recipe_from_options(model, method, budget, heads, **parts)
    size = _batch_size(batch_size)
    if ray is None and (replicas != 1 or gpus_per_replica is not None):
        raise ValueError("--replicas and --gpus-per-replica need --ray.")
    cluster = None if ray is None else Cluster(ray, replicas, gpus_per_replica)
    _check_paths(source, output)
    prompt = read_prompt(prompt, prompt_file)
    ids = read_ids(source, prompt)
    job = Job(load_checkpoint(model), recipe, max_new_tokens, size, device, dtype, max_pixels)
    with Output(output, job.about) as results_file:
        missing = {row for row, checksum in ids.items() if results_file.lacks(row, checksum)}
        totals = Totals(len(ids), results_file.results)
        try:
            if missing:
                rows = (row for row in read_rows(source, prompt) if row.id in missing)
                with _progress(len(ids), len(ids) - len(missing), quiet or as_json) as on_results:
                    batches = results(job, rows) if cluster is None else results_on(cluster, job, rows)
                    for batch_results in batches:
                        totals.add(results_file.append(batch_results))
                        on_results(batch_results)
            results_file.finish()
        except KeyboardInterrupt as stop:
            raise stopped(output) from stop
    summary = totals.summary(results_file, time.perf_counter() - started)
    if as_json:
        print(json.dumps(summary))
    else:
        show(table(summary))
        print(f"Wrote {printable(output)}")
    if results_file.errors:
        raise typer.Exit(1)


@dataclass
class Totals:
    """Running totals of a run; its results are not kept in memory."""

    rows: int
    before: int
    new: int = 0
    tokens: int = 0
    kv_bytes: int = 0
    full_kv_bytes: int = 0

    def add(self, results: list[Result]) -> None:
        """Add new results to the totals."""
        self.new += len(results)
        self.tokens += sum(result.tokens or 0 for result in results)
        self.kv_bytes += sum(result.kv_bytes or 0 for result in results)
        self.full_kv_bytes += sum(result.full_kv_bytes or 0 for result in results)

    def summary(self, output: Output, seconds: float) -> dict[str, Any]:
        """The totals as plain data."""
        return {
            "rows": self.rows,
            "before": self.before,
            "answered": output.results - sum(output.errors.values()),
            "errors": output.errors,
            "seconds": seconds,
            "rows_per_second": self.new / seconds,
            "new_tokens": self.tokens,
            "kv_bytes": self.kv_bytes,
            "full_kv_bytes": self.full_kv_bytes,
            "output": str(output.path),
        }


def table(summary: dict[str, Any]) -> Table:
    """A human-readable summary of a run."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows", f"{summary['rows']:,}")
    table.add_row("answered", f"{summary['answered']:,}")
    for kind, count in sorted(summary["errors"].items()):
        table.add_row(kind, f"{count:,}", style="red")
    if summary["before"]:
        table.add_row("done in earlier runs", f"{summary['before']:,}")
    table.add_row("time", f"{summary['seconds']:.1f} s")
    table.add_row("rows per second", f"{summary['rows_per_second']:.2f}")
    table.add_row("new tokens", f"{summary['new_tokens']:,}")
    if summary["full_kv_bytes"]:
        share = summary["kv_bytes"] / summary["full_kv_bytes"]
        table.add_row("KV memory after compression", f"{share:.1%} of the full cache")
    return table


def _check_paths(source: Path, output: Path) -> None:
    """Raise ValueError if the output cannot be written or is the input, or if the two seem to be swapped."""
    if source.resolve() == output.resolve():
        raise ValueError(f"{source} cannot be both the input and the output.")
    if not os.path.exists(source) and os.path.exists(output):
        raise ValueError(f"There is no input {source}, but {output} exists: name the input first, then the output.")
    check_file(output, replace=True)


def _batch_size(text: str) -> int | None:
    """The number, or None for ``auto``.

    Raises:
        ValueError: it is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--batch-size is an integer above 0 or auto, not {text!r}.")
    return int(text)


@contextmanager
def _progress(total: int, done: int, quiet: bool) -> Iterator[Any]:
    """Show a bar with the rate, the time left and the memory of the last batch on stderr, if that is a terminal."""
    terminal = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[memory]}"),
    )
    # Rows finish a batch at a time, which may take minutes.
    hidden = quiet or not terminal.is_terminal
    with Progress(*columns, console=terminal, disable=hidden, speed_estimate_period=600) as bar:
        task = bar.add_task("Answering", total=total, completed=done, rate="", memory="")
        started, count = time.perf_counter(), 0

        def on_results(finished: list[Result]) -> None:
            nonlocal count
            count += len(finished)
            rate = f"{count / (time.perf_counter() - started):.2f} rows/s"
            held, full = (
                sum(getattr(result, name) or 0 for result in finished) for name in ("kv_bytes", "full_kv_bytes")
            )
            bar.update(task, advance=len(finished), rate=rate)
            if full:
                bar.update(task, memory=f"KV {mebibytes(held)}, full cache {mebibytes(full)}")

        yield on_results
