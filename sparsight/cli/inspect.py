"""``sparsight inspect``: plot which image patches a compressed cache keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparsight.cli import options
from sparsight.cli.output import check_file, writing
from sparsight.models.images import MAX_PIXELS
from sparsight.utils.text import escape

if TYPE_CHECKING:
    from torch import Tensor

    from sparsight.cache import CompressedCache
    from sparsight.cache.report import Report
    from sparsight.cli.session import Question, Session
    from sparsight.compression.recipe import Recipe
    from sparsight.eval.heatmap import Kept, Moment
    from sparsight.models.layouts import Tile

MAX_NEW_TOKENS = 100
"""The longest answer that is generated to see what is recalled."""


def main(
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    image: options.Images = None,
    method: options.Method = options.DEFAULT_METHOD,
    budget: options.Budget = None,
    score: options.Score = None,
    allocate: options.Allocate = None,
    reduce: options.Reduce = None,
    decode: options.Decode = None,
    heads: options.Heads = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_pixels: options.MaxPixels = MAX_PIXELS,
    output: Annotated[Path, options.output("PNG file to write", "FILE")] = Path("inspect.png"),
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Plot which image patches stay in the KV cache, over the images, and which are recalled during an answer."""
    from sparsight.cli.recipe_options import recipe_from_options
    from sparsight.cli.session import open_session, read_prompt, read_question
    from sparsight.engine.prompt_runner import PromptRunner
    from sparsight.engine.vision_cache import VisionCache
    from sparsight.eval.heatmap import draw
    from sparsight.utils.plot_style import save

    parts = {"score": score, "allocate": allocate, "reduce": reduce, "decode": decode}
    recipe = recipe_from_options(model, method, budget, heads, **parts)
    if not image:
        raise ValueError("Without an image there is nothing to inspect: give --image.")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must be a .png file, got {output}.")
    check_file(output, replace=force)
    quiet = quiet or as_json
    tokens = MAX_NEW_TOKENS if recipe.decode.recalls else 1
    question = read_question(model, image, read_prompt(prompt, prompt_file), max_pixels, tokens, quiet=quiet)
    tiles = tiles_of(question)
    session = open_session(question, device, dtype, quiet=quiet)
    # The engine's prefill; there is no answer.
    runner = PromptRunner(session.model, recipe, session.inputs, None, VisionCache(session.model, 0))
    runner.step()
    cache, report = runner.cache, runner.report
    kept = kept_of(cache, report)
    moments = moments_of(session, recipe, tokens) if recipe.decode.recalls else []
    title = f"What {recipe.name} keeps at a {recipe.budget * 100:.3g}% budget"
    figure = draw(tiles, kept, title=title, subtitle=f"“{question.prompt}”", footnote=summary(report), moments=moments)
    with writing(output):
        save(figure, output)
    result = json.dumps(describe(output, tiles, kept, report))
    print(result if as_json else f"{summary(report)}\nWrote {escape(output)}")


def tiles_of(question: Question) -> list[Tile]:
    """The tiles of a question's images; their ``tokens`` are positions in the prompt.

    Raises:
        ValueError: the model's family is unknown, or the prompt does not fit its layout.
    """
    from sparsight.models.families import family_of
    from sparsight.models.layouts import find_tiles
    from sparsight.models.tile_places import place_tiles

    checkpoint = question.checkpoint
    family = family_of(checkpoint.config)
    assert family is not None
    processor = checkpoint.processor.image_processor
    tiles = find_tiles(family.layout, checkpoint.config, question.inputs, processor)
    return place_tiles(tiles, family.cut, processor, question.sizes)


def kept_of(cache: CompressedCache, report: Report) -> Kept:
    """The entries that a cache kept of its one prompt."""
    import torch

    from sparsight.eval.heatmap import Kept

    return Kept(
        layers=report.layers,
        by_position=torch.stack(
            [share_of_heads(cache.kept_positions(layer)[0], cache.prompt.length) for layer in report.layers]
        ),
        by_layer=[kept / report.prompt_tokens[0] for kept in report.kept_per_layer()],
        sparsity=None if report.sparsity is None else [layer[0] for layer in report.sparsity],
    )


def moments_of(session: Session, recipe: Recipe, max_new_tokens: int) -> list[Moment]:
    """What a cache holds after each recall, with what is generated until the next one."""
    from sparsight.cache import CompressedCache
    from sparsight.compression import Recall
    from sparsight.eval.heatmap import Moment

    assert isinstance(recipe.decode, Recall)
    cache = CompressedCache(session.model, recipe, session.inputs)
    recorder = _Recorder(cache, recipe.decode.every)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "streamer": recorder}
    # The engine does not show its caches between steps.
    session.model.generate(**session.inputs, past_key_values=cache, **options)
    tokenizer = session.processor.tokenizer
    parts = [
        tokenizer.decode(recorder.tokens[first : first + recipe.decode.every], skip_special_tokens=True)
        for first in range(1, len(recorder.tokens), recipe.decode.every)
    ]
    return [Moment(*each) for each in zip(parts, recorder.held, strict=True)]


class _Recorder:
    """A streamer for ``model.generate`` that notes what a cache holds after each recall.

    Attributes:
        tokens: the answer so far.
        held: fraction of all layers' KV heads that hold each prompt position, ``[T]``, by recall.
    """

    def __init__(self, cache: CompressedCache, every: int) -> None:
        self.tokens: list[int] = []
        self.held: list[Tensor] = []
        self._cache, self._every, self._is_prompt = cache, every, True

    def put(self, value: Tensor) -> None:
        """Note a token; all except the first follow from one that the cache has processed."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.tokens += value.flatten().tolist()
        if len(self.tokens) % self._every == 2 % self._every and len(self.tokens) > 1:
            self.held.append(kept_of(self._cache, self._cache.report()).by_position.mean(0))

    def end(self) -> None:
        """Nothing to do."""


def share_of_heads(positions: Tensor, length: int) -> Tensor:
    """Share of KV heads that keep each of ``length`` positions, float32 ``[T]``.

    ``positions`` is ``[H_kv, n]``, padded with -1.
    """
    import torch

    return torch.bincount(positions[positions >= 0].cpu(), minlength=length) / len(positions)


def summary(report: Report) -> str:
    """The report of one prompt in one line."""
    mean = sum(report.kept_per_layer()) / len(report.kept)
    return (
        f"{report.prompt_tokens[0]:,} prompt tokens, {report.vision_tokens[0]:,} of them vision; a layer keeps "
        f"{mean:,.1f} entries on average; KV memory {report.memory()}"
    )


def describe(output: Path, tiles: list[Tile], kept: Kept, report: Report) -> dict[str, Any]:
    """What the plot shows, as plain data."""
    return {
        "output": str(output),
        "method": report.method,
        "budget": report.budget,
        "prompt_tokens": report.prompt_tokens[0],
        "vision_tokens": report.vision_tokens[0],
        "layers": report.layers,
        "kept_per_layer": report.kept_per_layer(),
        "sparsity_per_layer": kept.sparsity,
        "entry_bytes": report.entry_bytes,
        "kv_bytes": report.bytes_held,
        "full_kv_bytes": report.full_bytes,
        "tiles": [
            {"name": tile.name, "rows": len(tile.tokens), "columns": tile.tokens.shape[1], "box": tile.box}
            for tile in tiles
        ],
    }
