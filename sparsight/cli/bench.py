"""``sparsight bench``: speed and memory of methods, compared with plain transformers and the hardware's limit."""

from __future__ import annotations

import json
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsight.cli import options
from sparsight.cli.output import check_folder
from sparsight.cli.parsing import budget_list, check_methods, check_one_of, count_list, names
from sparsight.cli.progress import progress
from sparsight.cli.terminal import show
from sparsight.utils.method_names import METHODS
from sparsight.utils.suggest import unknown
from sparsight.utils.text import escape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsight.bench.kvpress import CannotRun, Kvpress
    from sparsight.compression.recipe import Recipe

SHAPES = (
    "small", "llava-1.5-7b", "llava-1.5-13b", "llava-next-mistral-7b", "llava-next-34b",
    "qwen2.5-vl-3b", "qwen2.5-vl-7b",
)  # fmt: skip
LIBRARIES = ("transformers", "kvpress")
"""What the options take, for ``--help``, which does not import the tables of :mod:`sparsight.bench`."""


def main(
    model: Annotated[
        str | None,
        typer.Option(
            help="Vision-language model to measure instead of a shape: a folder or a Hugging Face Hub id.",
            metavar="MODEL",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            help=f"Language model with random weights, in bfloat16 on a GPU and float32 on a CPU: {', '.join(SHAPES)}.",
            metavar="NAME",
            rich_help_panel=options.MODEL,
            callback=check_one_of("shape", SHAPES),
        ),
    ] = "small",
    contexts: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, comma-separated; 2k is 2048.", metavar="NUMBERS")
    ] = "2k,8k",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.", metavar="NUMBERS")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Length of each answer in tokens.", min=2)] = 100,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, comma-separated, or all; `sparsight methods` lists them.",
            metavar="NAMES",
            callback=check_methods,
        ),
    ] = "full,vl-cache,elastic",
    budgets: options.Budgets = "0.1",
    against: Annotated[
        str, typer.Option(help=f"Baselines, comma-separated: {', '.join(LIBRARIES)}, or none.", metavar="NAMES")
    ] = "transformers",
    rounds: Annotated[int, typer.Option(help="Measured rounds, after one warm-up round.", min=1)] = 5,
    minutes: Annotated[
        float | None,
        typer.Option(help="Skip the sizes not started after this many minutes; the largest come last.", min=0),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's default if not given.", min=1)] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step on a CPU; doubles the memory for weights.")
    ] = False,
    heads: options.Heads = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[Path, options.output("Folder for bench.json, growth.png and speed-up.png", "DIR")] = Path(
        "runs/bench"
    ),
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure the speed and memory of methods, interleaved with plain transformers."""
    import torch
    import transformers

    from sparsight.bench import machine, tables
    from sparsight.bench.benchmark import BenchmarkConfig, run_benchmark
    from sparsight.bench.kvpress import Kvpress
    from sparsight.bench.shapes import random_inputs, weight_bytes, without_tokenizer
    from sparsight.bench.summary import summarize
    from sparsight.cache import CompressedCache
    from sparsight.cli.recipe_options import with_scores
    from sparsight.engine.model_runner import static_capacity
    from sparsight.models.loading import load_checkpoint, load_model
    from sparsight.utils import memory

    baselines = [] if against == "none" else names(against, LIBRARIES)
    for name in baselines:
        if name not in LIBRARIES:
            raise unknown("comparison", name, LIBRARIES)
    recipes = [with_scores(each, model, heads) for each in _recipes(names(methods, METHODS), budget_list(budgets))]
    if model is None:
        recipes = list(map(without_tokenizer, recipes))
    plan = BenchmarkConfig(
        contexts=count_list("--contexts", contexts),
        batches=count_list("--batch", batch),
        recipes=recipes,
        against=baselines,
        new_tokens=new_tokens,
        rounds=rounds,
        minutes=inf if minutes is None else minutes,
        compiled=compiled,
    )
    check_folder(output, tables.RESULTS, replace=force)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = _random(shape, device, dtype) if model is None else load_model(load_checkpoint(model), device, dtype)
    if loaded.device.type not in machine.COPIED_BYTES:
        raise ValueError(f"Measuring needs the device cpu or cuda, not {loaded.device.type!r}.")
    for each in tuple(recipes):
        capacity = static_capacity(loaded, new_tokens, compile=compiled)
        try:
            # Before anything is measured: whether the model and the recipe can be combined.
            CompressedCache(loaded, each, random_inputs(loaded, length=1, batch=1), capacity)
        except ValueError as error:
            if methods != "all":
                raise
            recipes.remove(each)
            print(f"Left out {each.name}: {escape(str(error))}", file=sys.stderr)
    tables.make_folder(output)
    weights, free = weight_bytes(loaded), memory.available_bytes(loaded.device)
    about = {
        "command": "sparsight " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": loaded.device.type,
        "machine": machine.describe(loaded.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": f"{shape}, random weights" if model is None else model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "weight_bytes": weights,
    }
    measured = []
    with progress("Measuring", quiet=quiet or as_json) as on_progress:
        if "kvpress" in baselines:
            on_progress("setting up kvpress", 0, 1)
        with _kvpress(baselines, loaded) as kvpress:
            if isinstance(kvpress, Kvpress):
                about["kvpress"] = kvpress.versions
            for size in run_benchmark(plan, loaded, on_progress, kvpress):
                measured.append(size)
                measured.sort(key=lambda size: (size[0].context, size[0].batch))
                report = {**about, "cells": summarize(measured, new_tokens, weights, free)}
                # A stopped run keeps its results so far.
                tables.write(report, output)
    written = [tables.RESULTS, *(path.name for path in tables.draw(report, output))]
    if as_json:
        print(json.dumps(report))
        return
    about_run = f"{report['model']}, {report['dtype']}, {report['machine']}, {new_tokens} tokens, {rounds} rounds\n"
    show(escape(about_run, keep="\n"), *tables.tables(report))
    print(f"Wrote {', '.join(written)} in {escape(output)}")


def _random(shape: str, device: str, dtype: str) -> PreTrainedModel:
    """A shape's model with random weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: there is no such dtype or device, or the weights do not fit.
    """
    import torch

    from sparsight.bench.shapes import SHAPES, parameters, random_model
    from sparsight.models.loading import DTYPES, find_device
    from sparsight.utils import memory

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    place = torch.device(find_device(device))
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    weights_dtype = getattr(torch, dtype)
    needed, free = parameters(SHAPES[shape]) * weights_dtype.itemsize, memory.available_bytes(place)
    if needed > free:
        raise ValueError(
            f"The weights of {shape} take {needed / 2**30:.1f} GiB in {dtype}, and "
            f"{place} has {free / 2**30:.1f} GiB free: choose another shape, dtype or device."
        )
    return random_model(SHAPES[shape], place, weights_dtype)


def _kvpress(baselines: list[str], model: PreTrainedModel) -> AbstractContextManager[Kvpress | CannotRun | None]:
    """The kvpress process if kvpress is among the baselines, or the reason why it cannot run."""
    from sparsight.bench.kvpress import CannotRun, Kvpress

    if "kvpress" not in baselines:
        return nullcontext()
    try:
        return Kvpress.like(model)
    except CannotRun as error:
        return nullcontext(error)


def _recipes(methods: list[str], budgets: list[float]) -> list[Recipe]:
    """Every method at every budget; the full cache once."""
    from sparsight.methods import recipe

    full = [recipe(method) for method in methods if method == "full"]
    return full + [recipe(method, budget=budget) for method in methods if method != "full" for budget in budgets]
