"""``sparsight bench``: speed and memory of methods, against plain transformers and the machine's limit."""

import json
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from transformers import PreTrainedModel

from sparsight.bench import machine, tables
from sparsight.bench.benchmark import LIBRARIES, BenchmarkConfig, run_benchmark
from sparsight.bench.kvpress import CannotRun, Kvpress
from sparsight.bench.shapes import SHAPES, parameters, random_inputs, random_model, weight_bytes
from sparsight.bench.summary import summarize
from sparsight.cache import CompressedCache
from sparsight.cli import options
from sparsight.cli.parsing import budget_list, count_list, names
from sparsight.cli.progress import progress
from sparsight.compression.recipe import Recipe
from sparsight.engine.model_runner import static_capacity
from sparsight.methods import recipe
from sparsight.models.loading import DTYPES, find_device, load_checkpoint, load_model
from sparsight.utils.suggest import unknown


def bench(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a vision-language model, instead of a shape.")
    ] = None,
    shape: Annotated[
        str, typer.Option(help=f"Language part with random weights: {', '.join(SHAPES)}.", metavar="NAME")
    ] = "small",
    contexts: Annotated[str, typer.Option(help="Prompt tokens; 2k is 2048.", metavar="NUMBERS")] = "2k,8k",
    batch: Annotated[str, typer.Option(help="Prompts answered together.", metavar="NUMBERS")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 100,
    methods: Annotated[
        str, typer.Option(help="Methods that `sparsight methods` lists.", metavar="NAMES")
    ] = "full,vl-cache,elastic",
    budgets: Annotated[str, typer.Option(help="Fractions of the prompt's KV entries.", metavar="NUMBERS")] = "0.1",
    against: Annotated[
        str, typer.Option(help=f"Libraries to compare with: {', '.join(LIBRARIES)}, or none.", metavar="NAMES")
    ] = "transformers",
    rounds: Annotated[int, typer.Option(help="Rounds that count, after one that does not.", min=1)] = 5,
    minutes: Annotated[
        float | None, typer.Option(help="What has not begun by then is left out; large sizes come last.", min=0)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if not given.", min=1)] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="On a CPU, compile the methods' decode steps; weights are held twice.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for bench.json, speed-up.png and growth.png.", metavar="DIR")
    ] = Path("runs/bench"),
    as_json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Measure what methods cost at prefill and gain at decoding, in turns with plain transformers."""
    rivals = [] if against == "none" else names(against, LIBRARIES)
    for name in rivals:
        if name not in LIBRARIES:
            raise unknown("comparison", name, LIBRARIES)
    plan = BenchmarkConfig(
        contexts=count_list("--contexts", contexts),
        batches=count_list("--batch", batch),
        recipes=_recipes(names(methods, ()), budget_list(budgets)),
        against=rivals,
        new_tokens=new_tokens,
        rounds=rounds,
        minutes=inf if minutes is None else minutes,
        compiled=compiled,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = _random(shape, device, dtype) if model is None else load_model(load_checkpoint(model), device, dtype)
    if loaded.device.type not in machine.COPIED_BYTES:
        raise ValueError(f"Measuring needs the device cpu or cuda, not {loaded.device.type!r}.")
    for each in plan.recipes:
        # Refuses what the model cannot take before anything is measured.
        CompressedCache(
            loaded,
            each,
            random_inputs(loaded, length=1, batch=1),
            static_capacity(loaded, new_tokens, compile=compiled),
        )
    tables.make_folder(output)
    weights, free = weight_bytes(loaded), machine.available_bytes(loaded.device)
    about = {
        "command": "sparsight " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).date().isoformat(),
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
    with progress("Measuring", quiet=as_json) as on_progress:
        if "kvpress" in rivals:
            on_progress("setting up kvpress", 0, 1)
        with _kvpress(rivals, loaded) as kvpress:
            if isinstance(kvpress, Kvpress):
                about["kvpress"] = kvpress.versions
            for size in run_benchmark(plan, loaded, on_progress, kvpress):
                measured.append(size)
                measured.sort(key=lambda size: (size[0].context, size[0].batch))
                found = {**about, "cells": summarize(measured, new_tokens, weights, free)}
                # A run that is stopped leaves what it found.
                tables.write(found, output)
    written = [tables.RESULTS, *(path.name for path in tables.draw(found, output))]
    if as_json:
        print(json.dumps(found))
        return
    console = Console(highlight=False)
    console.print(f"{found['model']}, {found['dtype']}, {found['machine']}, {new_tokens} tokens, {rounds} rounds\n")
    for part in tables.tables(found):
        console.print(part)
    console.print(f"Wrote {', '.join(written)} in {output}", markup=False)


def _random(shape: str, device: str, dtype: str) -> PreTrainedModel:
    """A shape's model with random weights, bfloat16 on a GPU and float32 on a CPU unless told otherwise.

    Raises:
        ValueError: there is no such shape, or its weights do not fit.
    """
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    place = torch.device(find_device(device))
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    chosen = getattr(torch, dtype)
    needed, free = parameters(SHAPES[shape]) * chosen.itemsize, machine.available_bytes(place)
    if needed > free:
        raise ValueError(
            f"The weights of {shape} take {needed / 2**30:.1f} GiB in {dtype}, and "
            f"{place} has {free / 2**30:.1f} GiB free: choose another shape, dtype or device."
        )
    return random_model(SHAPES[shape], place, chosen)


def _kvpress(rivals: list[str], model: PreTrainedModel) -> AbstractContextManager[Kvpress | CannotRun | None]:
    """The process of kvpress, or why there is none, if it was asked for."""
    if "kvpress" not in rivals:
        return nullcontext()
    try:
        return Kvpress.like(model)
    except CannotRun as error:
        return nullcontext(error)


def _recipes(methods: list[str], budgets: list[float]) -> list[Recipe]:
    """Every method at every budget; the full cache has one."""
    full = [recipe(method) for method in methods if method == "full"]
    return full + [recipe(method, budget=budget) for method in methods if method != "full" for budget in budgets]
