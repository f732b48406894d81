"""``sparsight generate``: answer a question about images with a compressed KV cache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparsight.cli import options
from sparsight.cli.terminal import show
from sparsight.models.images import MAX_PIXELS
from sparsight.utils.text import escape, mebibytes

if TYPE_CHECKING:
    from sparsight.engine.request import Completion


def main(
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    image: options.Images = None,
    max_new_tokens: options.MaxNewTokens = 100,
    method: options.Method = options.DEFAULT_METHOD,
    budget: options.Budget = None,
    score: options.Score = None,
    allocate: options.Allocate = None,
    reduce: options.Reduce = None,
    decode: options.Decode = None,
    heads: options.Heads = None,
    prefill_bound: options.PrefillBound = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(help="Prefill the prompt in chunks of this many tokens.", min=2, rich_help_panel=options.METHOD),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_pixels: options.MaxPixels = MAX_PIXELS,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also answer with the full cache, and show both.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Answer a question about images, and show the memory and speed of the compressed KV cache."""
    from sparsight.cache.bounded_prefill import check_bound
    from sparsight.cli.answer import answer
    from sparsight.cli.recipe_options import recipe_from_options
    from sparsight.cli.session import open_session, read_prompt, read_question
    from sparsight.eval.metrics import same_tokens
    from sparsight.methods import Full
    from sparsight.models.families import check_chunks

    parts = {"score": score, "allocate": allocate, "reduce": reduce, "decode": decode}
    recipe = recipe_from_options(model, method, budget, heads, **parts)
    if prefill_bound is not None:
        check_bound(prefill_bound, recipe)
    quiet = quiet or as_json
    text = read_prompt(prompt, prompt_file)
    question = read_question(model, image or [], text, max_pixels, max_new_tokens, quiet=quiet)
    if prefill_chunk is not None:
        check_chunks(question.checkpoint.config)
    session = open_session(question, device, dtype, quiet=quiet)
    if compare:
        # A warm-up, so that neither of the two runs pays for it.
        answer(session, Full(), 1, prefill_chunk)
    compressed = answer(session, recipe, max_new_tokens, prefill_chunk, prefill_bound, None if as_json else _write)
    report = compressed.report
    result = {"model": options.model_name(model), "method": recipe.name, "budget": recipe.budget}
    result |= describe(compressed) | {"exact": report.exact, "cut_short": report.cut_short}
    if compare:
        full = answer(session, Full(), max_new_tokens, prefill_chunk)
        # The positions and the spare capacity are not the full cache's.
        result["full"] = describe(full) | {"kv_bytes": full.report.full_bytes}
        result["agreement"] = same_tokens(compressed.token_ids, full.token_ids)
    if as_json:
        print(json.dumps(result))
    else:
        print("\n", *report.caveats(), sep="\n")
        show(table(f"{recipe.name}, {recipe.budget * 100:.3g}%", result))


def describe(answer: Completion) -> dict[str, Any]:
    """One run as plain data."""
    report = answer.report
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": report.prompt_tokens[0],
        "vision_tokens": report.vision_tokens[0],
        "layers": report.layers,
        "kept_per_layer": report.kept_per_layer(),
        "entry_bytes": report.entry_bytes,
        "kv_bytes": report.bytes_held,
        "full_kv_bytes": report.full_bytes,
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": answer.decode_seconds,
        "new_tokens": len(answer.tokens),
    }


def table(name: str, result: dict[str, Any]) -> Table:
    """The measurements of one run, or of two side by side."""
    runs = [result, result["full"]] if "full" in result else [result]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for title in [name, "full cache"][: len(runs)]:
        table.add_column(title, justify="right", header_style="bold cyan")
    for label, cell in ROWS.items():
        table.add_row(label, *map(cell, runs))
    if "agreement" in result:
        table.add_row("agreement of the answers", f"{result['agreement']:.0%}")
    return table


def _entries(run: dict[str, Any]) -> str:
    mean = sum(run["kept_per_layer"]) / len(run["kept_per_layer"])
    return f"{mean:,.1f} ({mean / run['prompt_tokens']:.1%})"


def _speed(run: dict[str, Any]) -> str:
    return f"{(run['new_tokens'] - 1) / run['decode_seconds']:,.1f}" if run["decode_seconds"] else "-"


ROWS = {
    "prompt tokens": lambda run: f"{run['prompt_tokens']:,}",
    "vision tokens": lambda run: f"{run['vision_tokens']:,}",
    "entries kept per layer, mean": _entries,
    "KV memory of the entries": lambda run: (
        f"{mebibytes(run['entry_bytes'])} ({run['entry_bytes'] / run['full_kv_bytes']:.1%})"
    ),
    "with spare capacity": lambda run: mebibytes(run["kv_bytes"]),
    "time to first token": lambda run: f"{run['prefill_seconds']:.2f} s",
    "tokens per second": _speed,
    "new tokens": lambda run: f"{run['new_tokens']:,}",
}


def _write(text: str) -> None:
    print(escape(text, keep="\n\t"), end="", flush=True)
