"""``sparsight batch``: many questions about images, answered in batches, into a file that a stopped run continues."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, KeysView
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsight.batch_inference.input import Input, open_input
from sparsight.batch_inference.output import Output, OutputFile, StandardOutput, check_output_path
from sparsight.batch_inference.result import Result, check_keep
from sparsight.batch_inference.rows import RowKey
from sparsight.cli import options
from sparsight.cli.terminal import console, show, stopped
from sparsight.models.images import MAX_PIXELS
from sparsight.utils.text import mebibytes, printable

if TYPE_CHECKING:
    from sparsight.batch_inference.job import Job
    from sparsight.batch_inference.ray_data import Cluster


def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="JSON lines (- for standard input), a folder of images, or Parquet with the images' bytes.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="JSON lines (- for standard output) or .parquet; the same command continues a stopped run.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="The question for all rows that have none; - reads it from standard input.", metavar="TEXT"),
    ] = None,
    prompt_file: options.PromptFile = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A field of INPUT to copy into the results. Repeat for several.", metavar="FIELD"),
    ] = None,
    retry_errors: Annotated[
        bool,
        typer.Option(
            "--retry-errors",
            help="Answer rows again whose result is an error; those out of memory or malformed always are.",
        ),
    ] = False,
    model: options.Model = options.DEFAULT_MODEL,
    method: options.Method = options.DEFAULT_METHOD,
    budget: options.Budget = None,
    score: options.Score = None,
    allocate: options.Allocate = None,
    reduce: options.Reduce = None,
    decode: options.Decode = None,
    heads: options.Heads = None,
    prefill_bound: options.PrefillBound = None,
    host_memory: options.HostMemory = "0",
    host_dtype: options.HostDtype = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 100,
    batch_size: Annotated[
        str, typer.Option(help="Sequences that decode together; auto: as many as fit in memory.", metavar="NUMBER")
    ] = "auto",
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: its address, auto, or local to start one.", metavar="ADDRESS"),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Copies of the model on the Ray cluster.", min=1)] = 1,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(help="GPUs per replica; by default one if the cluster has any.", min=0, show_default=False),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_pixels: options.MaxPixels = MAX_PIXELS,
) -> None:
    """Ask a model about many images; exits with 1 if some rows have no answer."""
    from sparsight.batch_inference.job import Job
    from sparsight.batch_inference.ray_data import Cluster
    from sparsight.cli.parsing import byte_count
    from sparsight.cli.recipe_options import recipe_from_options
    from sparsight.cli.session import read_prompt
    from sparsight.models.loading import load_checkpoint

    started = time.perf_counter()
    parts = {"score": score, "allocate": allocate, "reduce": reduce, "decode": decode}
    recipe = recipe_from_options(model, method, budget, heads, **parts)
    size, host_bytes = _batch_size(batch_size), byte_count("--host-memory", host_memory)
    if ray is None and (replicas != 1 or gpus_per_replica is not None):
        raise ValueError("--replicas and --gpus-per-replica are for --ray, which is not given.")
    cluster = None if ray is None else Cluster(ray, replicas, gpus_per_replica)
    fields = tuple(dict.fromkeys(keep or ()))
    _check_paths(source, output)
    check_keep(fields)
    if prompt == "-" and str(source) == "-":
        raise ValueError("The prompt and INPUT cannot both be standard input: name a file for one of them.")
    prompt = read_prompt(prompt, prompt_file)
    with open_input(source, prompt, fields) as rows:
        prompts = rows.scan()
        checkpoint, memory = load_checkpoint(model), (prefill_bound, host_bytes, host_dtype)
        job = Job(checkpoint, recipe, max_new_tokens, size, device, dtype, max_pixels, *memory)
        with _open_output(output, job.settings, fields, retry_errors) as results:
            missing = results.missing(prompts)
            totals = Totals(len(prompts) - len(missing))
            try:
                if missing:
                    with _progress(len(prompts), totals.before, quiet or as_json) as on_results:
                        for batch_results in _answer(job, cluster, rows, missing):
                            totals.add(results.append(batch_results))
                            on_results(batch_results)
                results.finish()
            except KeyboardInterrupt as stop:
                raise stopped(output) from stop
            summary = totals.summary(prompts.keys(), results, output, time.perf_counter() - started)
            lacking = len(results.missing(prompts))
    _print_summary(summary, output, as_json)
    if lacking:
        print(
            f"Error: {lacking:,} rows have no result: the input changed during the run. Repeat the command.",
            file=sys.stderr,
        )
    if lacking or summary["errors"]:
        raise typer.Exit(1)


def _open_output(path: Path, settings: dict[str, Any], keep: tuple[str, ...], retry_errors: bool) -> Output:
    return StandardOutput() if str(path) == "-" else OutputFile(path, settings, keep, retry_errors=retry_errors)


def _print_summary(summary: dict[str, Any], output: Path, as_json: bool) -> None:
    """Print the summary to standard output, or to standard error if the results are there."""
    to_stdout = str(output) == "-"
    stream = sys.stderr if to_stdout else sys.stdout
    if as_json:
        print(json.dumps(summary), file=stream)
        return
    show(table(summary), stderr=to_stdout)
    if not to_stdout and output.exists():
        print(f"Wrote {printable(output)}")


def _check_paths(source: Path, output: Path) -> None:
    """Raise ValueError if the output cannot be one, or input and output are the same or swapped."""
    if str(output) == "-":
        return
    check_output_path(output)
    if source.resolve() == output.resolve():
        raise ValueError(f"{printable(source)} cannot be both the input and the output.")
    if str(source) != "-" and not source.exists() and output.exists():
        raise ValueError(
            f"There is no input {printable(source)}, but the output {printable(output)} exists: "
            "INPUT comes first, then OUTPUT."
        )


def _answer(job: Job, cluster: Cluster | None, source: Input, missing: set[RowKey]) -> Iterator[list[Result]]:
    """Results of the missing rows."""
    from sparsight.batch_inference.job import run_job
    from sparsight.batch_inference.ray_data import run_job_on_ray

    rows = (row for row in source.rows() if row.key in missing)
    # Closed at once when the run stops: worker processes and the engine's threads end with it.
    with closing(run_job(job, rows) if cluster is None else run_job_on_ray(cluster, job, rows)) as results:
        yield from results


@dataclass
class Totals:
    """Sums over the results of a run."""

    before: int
    new: int = 0
    tokens: int = 0
    kv_bytes: int = 0
    full_kv_bytes: int = 0

    def add(self, results: list[Result]) -> None:
        """Add new results."""
        self.new += len(results)
        self.tokens += sum(result.tokens or 0 for result in results)
        self.kv_bytes += sum(result.kv_bytes or 0 for result in results)
        self.full_kv_bytes += sum(result.full_kv_bytes or 0 for result in results)

    def summary(self, keys: KeysView[RowKey], results: Output, output: Path, seconds: float) -> dict[str, Any]:
        """The run as plain data; ``keys`` are the rows of the input."""
        errors = Counter(results.outcomes[key] for key in keys if key in results.outcomes)
        answered = errors.pop(None, 0)
        return {
            "rows": len(keys),
            "before": self.before,
            "answered": answered,
            "errors": dict(errors),
            "not_in_input": len(results.outcomes.keys() - keys),
            "seconds": seconds,
            "rows_per_second": self.new / seconds,
            "new_tokens": self.tokens,
            "kv_bytes": self.kv_bytes,
            "full_kv_bytes": self.full_kv_bytes,
            "output": str(output),
        }


def table(summary: dict[str, Any]) -> Table:
    """A human-readable summary."""
    shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    shown.add_row("rows", f"{summary['rows']:,}")
    shown.add_row("answered", f"{summary['answered']:,}")
    for kind, count in sorted(summary["errors"].items()):
        shown.add_row(kind, f"{count:,}", style="red")
    if summary["before"]:
        shown.add_row("of them done before", f"{summary['before']:,}")
    if summary["not_in_input"]:
        shown.add_row("results of rows not in the input", f"{summary['not_in_input']:,}")
    shown.add_row("time", f"{summary['seconds']:.1f} s")
    shown.add_row("rows per second", f"{summary['rows_per_second']:.2f}")
    shown.add_row("new tokens", f"{summary['new_tokens']:,}")
    if summary["full_kv_bytes"]:
        share = summary["kv_bytes"] / summary["full_kv_bytes"]
        shown.add_row("KV memory, spare capacity included", f"{share:.1%} of the full cache")
    return shown


def _batch_size(text: str) -> int | None:
    """A number, or None for ``auto``.

    Raises:
        ValueError: the text is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--batch-size must be an integer above 0 or auto, not {text!r}.")
    return int(text)


@contextmanager
def _progress(total: int, done: int, quiet: bool) -> Iterator[Any]:
    """A progress bar on stderr with rate, time left and the memory of the newest results, if stderr is a terminal."""
    bar_console = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[memory]}"),
    )
    # Many results may come at once, and then none for minutes.
    hidden = quiet or not bar_console.is_terminal
    with Progress(*columns, console=bar_console, disable=hidden, speed_estimate_period=600) as bar:
        shown = bar.add_task("Answering", total=total, completed=done, rate="", memory="")
        started, count = time.perf_counter(), 0

        def on_results(results: list[Result]) -> None:
            nonlocal count
            count += len(results)
            rate = f"{count / (time.perf_counter() - started):.2f} rows/s"
            held, full = (
                sum(getattr(result, name) or 0 for result in results) for name in ("kv_bytes", "full_kv_bytes")
            )
            bar.update(shown, advance=len(results), rate=rate)
            if full:
                bar.update(shown, memory=f"KV {mebibytes(held)}, full cache {mebibytes(full)}")

        yield on_results
