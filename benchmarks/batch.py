r"""`sparsight batch` at 10 % against a plain transformers loop with the full cache: rows per second and peak memory.

Both transcribe the same pages with the same number of new tokens, the loop at its best batch size. With
``--shortest-answer`` the number is drawn for each page; a batch of the loop lasts as long as its longest answer. Their
turns are interleaved, each in a process of its own, so that changes of the machine's speed affect both, and memory is
measured per process. Memory of child processes is polled in separate turns that are not timed.

    python -m benchmarks.batch measure --pages 2000 --output benchmarks/results/batch-cpu.json
    python -m benchmarks.batch measure --pages 2000 --shortest-answer 4 --new-tokens 300 \
        --output benchmarks/results/batch-mixed-cpu.json
    python -m benchmarks.batch memory benchmarks/results/batch-cpu.json
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import StoppingCriteria, StoppingCriteriaList

from sparsight.batch_inference.generator import BatchGenerator
from sparsight.batch_inference.input import Input
from sparsight.batch_inference.job import Job, run_job
from sparsight.batch_inference.rows import Row
from sparsight.engine.sampling import SamplingParams
from sparsight.methods import recipe
from sparsight.models.images import open_image
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader import model_path
from sparsight.reader.skills import read_out

MODEL = "reader"
SEED = 11
RECORDS = 9
POLL_SECONDS = 0.02
LOOP, BATCH = "transformers loop, full cache", "sparsight batch"

app = typer.Typer(add_completion=False)


@app.command()
def measure(
    pages: Annotated[int, typer.Option(help="Pages to transcribe.")] = 2000,
    turn: Annotated[int, typer.Option(help="Pages per turn.")] = 250,
    new_tokens: Annotated[int, typer.Option(help="Tokens per answer, or of the longest one.")] = 100,
    shortest_answer: Annotated[
        int | None, typer.Option(help="Tokens of the shortest answer; by default all are equally long.")
    ] = None,
    sizes: Annotated[str, typer.Option(help="Batch sizes to try for the loop.")] = "4,8,16,32,64",
    tried: Annotated[int, typer.Option(help="Pages to try each batch size on.")] = 64,
    method: Annotated[str, typer.Option(help="A method that `sparsight methods` lists.")] = "vl-cache",
    budget: Annotated[float, typer.Option(help="Fraction of the prompt's KV entries.")] = 0.1,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Run the benchmark and print its table: ``python -m benchmarks.batch measure``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        endless_model(folder / MODEL)
        turns = [draw(folder, first, min(turn, pages - first)) for first in range(0, pages, turn)]
        sample = draw(folder, pages, tried)
        shortest = new_tokens if shortest_answer is None else shortest_answer
        chosen = [shortest, new_tokens, threads, method, budget]
        # Pages for the search of the batch size are not measured later.
        speeds = {
            size: tried / run("loop", sample, size, *chosen)["seconds"]
            for size in track([int(each) for each in sizes.split(",")], description="batch sizes")
        }
        best = max(speeds, key=lambda size: speeds[size])
        found: dict[str, list[dict[str, Any]]] = {LOOP: [], BATCH: []}
        for number, part in enumerate(track(turns, description="turns")):
            both = [(LOOP, "loop"), (BATCH, "batch")]
            for label, side in both[:: 1 if number % 2 == 0 else -1]:
                found[label].append(run(side, part, best, *chosen))
    cases = {label: summary(parts) for label, parts in found.items()}
    result: dict[str, Any] = {
        "command": "python -m benchmarks.batch " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs",
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pages": pages,
        "shortest_answer": shortest,
        "new_tokens": new_tokens,
        "method": method,
        "budget": budget,
        "loop_rows_per_second_by_batch_size": speeds,
        "loop_batch_size": best,
        "cases": cases,
    }
    ratios = [loop["seconds"] / ours["seconds"] for loop, ours in zip(found[LOOP], found[BATCH], strict=True)]
    result["speed_up"] = cases[BATCH]["rows_per_second"] / cases[LOOP]["rows_per_second"]
    result["speed_up_by_turn"] = ratios
    show(result)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


def endless_model(folder: Path) -> None:
    """The bundled model without an end-of-sequence token, so that both generate the same number of tokens."""
    shutil.copytree(model_path(), folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))


def draw(folder: Path, first: int, count: int) -> Path:
    """A JSON-lines file of ``count`` rows, with their pages as images beside it."""
    lines = []
    for number in range(first, first + count):
        example = read_out(np.random.default_rng([SEED, number]), "heldout", RECORDS)
        example.pictures()[0].save(folder / f"{number}.png")
        lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "prompt": example.turns[0][0]}))
    path = folder / f"{first}-{count}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(side: str, rows: Path, size: int, *chosen: object) -> dict[str, Any]:
    """One side's turn in a process of its own: seconds, rows, tokens, and the peak memory of the process."""
    with started(side, rows, size, *chosen) as process:
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    measured: dict[str, Any] = json.loads(out)
    return measured


def started(*arguments: object) -> "subprocess.Popen[str]":
    """A process that runs one side's turn."""
    command = [sys.executable, "-m", "benchmarks.batch", "side", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@app.command()
def memory(
    result: Annotated[Path, typer.Argument(help="The result of `measure`, to which the peaks are added.")],
    pages: Annotated[int, typer.Option(help="Pages to transcribe.")] = 256,
) -> None:
    """Add each side's peak of private memory with its children, from separate turns, since polling takes time."""
    found = json.loads(result.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        endless_model(folder / MODEL)
        rows = draw(folder, 0, pages)
        names = ("loop_batch_size", "shortest_answer", "new_tokens", "threads", "method", "budget")
        chosen = [found[each] for each in names]
        for label, side in ((LOOP, "loop"), (BATCH, "batch")):
            with started(side, rows, *chosen) as process:
                peak = Peak(process.pid)
                process.communicate()
            found["cases"][label]["peak_bytes_with_children"] = peak.stop()
    found["memory_command"] = "python -m benchmarks.batch " + " ".join(sys.argv[1:])
    show(found)
    result.write_text(json.dumps(found, indent=2) + "\n")


class Peak:
    """Peak of the private memory of a process and its children, by polling.

    Libraries that this process has loaded too are shared memory, and count for neither side.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def stop(self) -> int:
        """The peak, in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._bytes

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            try:
                every = [self._process, *self._process.children(recursive=True)]
                self._bytes = max(self._bytes, sum(each.memory_full_info().uss for each in every))
            except (psutil.Error, OSError):
                # The process or a child has ended.
                continue


@app.command()
def side(
    which: str, rows: Path, size: int, shortest: int, new_tokens: int, threads: int, method: str, budget: float
) -> None:
    """One side's turn, run by the other commands: prints its measurements as JSON."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    checkpoint = load_checkpoint(str(rows.parent / MODEL))
    rows_to_answer = list(Input(rows).rows())
    planned = {row.id: answer_length(row, shortest, new_tokens) for row in rows_to_answer}
    start = time.perf_counter()
    if which == "loop":
        tokens = dict(loop(checkpoint, rows_to_answer, size, planned))
    else:
        job = PlannedJob(checkpoint, recipe(method, budget=budget), new_tokens)
        job.planned.update(planned)
        found = [result for some in run_job(job, rows_to_answer) for result in some]
        tokens = {result.id: result.tokens or 0 for result in found}
    seconds = time.perf_counter() - start
    assert tokens == planned, "both must do the same work"
    measured = {"seconds": seconds, "rows": len(tokens), "tokens": sum(tokens.values())}
    # Linux counts in KiB.
    print(json.dumps({**measured, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def answer_length(row: Row, shortest: int, longest: int) -> int:
    """Tokens of the answer to a row, uniformly distributed."""
    return int(np.random.default_rng([SEED, 1, int(str(row.id))]).integers(shortest, longest, endpoint=True))


class PlannedGenerator(BatchGenerator):
    """Gives each answer its number of tokens."""

    planned: dict[Any, int]

    def params(self, row: Row) -> SamplingParams:
        """Those of all rows, with the row's number of tokens."""
        return replace(super().params(row), max_new_tokens=self.planned[row.id])


@dataclass(frozen=True)
class PlannedJob(Job):
    """A job whose answers have given numbers of tokens."""

    planned: dict[Any, int] = field(default_factory=dict)

    def generator(self, model: Any = None) -> BatchGenerator:
        """A generator of a loaded model, or of the checkpoint's, which is loaded if None."""
        model = model or load_model(self.checkpoint, self.device, self.dtype)
        generator = PlannedGenerator(model, self.preprocessor, self.recipe, self.batch_size, self.prefill_bound)
        generator.planned = self.planned
        return generator


class Planned(StoppingCriteria):
    """Ends each answer of a batch at its number of tokens, as an end-of-sequence token would.

    Args:
        prompt: tokens of the padded prompts.
        counts: tokens of each answer.
    """

    def __init__(self, prompt: int, counts: list[int]) -> None:
        self._lengths = prompt + torch.tensor(counts)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Which answers have ended, bool ``[B]``."""
        return self._lengths.to(input_ids.device) <= input_ids.shape[1]


def loop(checkpoint: Any, rows: list[Row], size: int, planned: dict[Any, int]) -> Iterator[tuple[Any, int]]:
    """Ids of rows and the number of new tokens of each, with plain transformers."""
    model, processor = load_model(checkpoint), checkpoint.processor
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        messages = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": image_of(row)}, {"type": "text", "text": row.prompt}],
                }
            ]
            for row in part
        ]
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device, model.dtype)
        counts, prompt = [planned[row.id] for row in part], inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList([Planned(prompt, counts)])
        output = model.generate(**inputs, max_new_tokens=max(counts), do_sample=False, stopping_criteria=criteria)
        new = [ids[:count] for ids, count in zip(output[:, prompt:], counts, strict=True)]
        processor.batch_decode(new, skip_special_tokens=True)
        yield from [(row.id, len(ids)) for row, ids in zip(part, new, strict=True)]


def image_of(row: Row) -> Any:
    """The only image of a row."""
    (image,) = row.images
    assert isinstance(image, Path)
    return open_image(image)


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The total of one side's turns."""
    rows, seconds = sum(part["rows"] for part in parts), sum(part["seconds"] for part in parts)
    return {
        "rows_per_second": rows / seconds,
        "seconds": seconds,
        "seconds_per_turn": [part["seconds"] for part in parts],
        "new_tokens_per_row": fmean(part["tokens"] / part["rows"] for part in parts),
        "peak_bytes": max(part["peak_bytes"] for part in parts),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    shortest, longest = result["shortest_answer"], result["new_tokens"]
    tokens = f"{longest} new tokens each" if shortest == longest else f"{shortest} to {longest} new tokens"
    table = Table(title=f"{result['pages']} pages, {tokens}, {result['threads']} threads")
    for column in ("", "rows per second", "peak MiB", "private MiB, with children"):
        table.add_column(column, justify="right" if column else "left")
    for label, case in result["cases"].items():
        peaks = [
            f"{case[name] / 2**20:,.0f}" if name in case else "-" for name in ("peak_bytes", "peak_bytes_with_children")
        ]
        table.add_row(label, f"{case['rows_per_second']:.3f}", *peaks)
    Console().print(table, f"{result['speed_up']:.2f}x; the loop's best batch size is {result['loop_batch_size']}")


if __name__ == "__main__":
    app()
