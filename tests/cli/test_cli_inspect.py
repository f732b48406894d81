from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.feature_extraction_utils import BatchFeature

from sparsight import CompressedCache, recipe
from sparsight.cli import inspect as command
from sparsight.cli.session import Question
from sparsight.eval import heatmap
from sparsight.eval.heatmap import Kept
from sparsight.models.images import open_image
from sparsight.models.inputs import prepare
from sparsight.models.layouts import Tile
from sparsight.models.loading import Checkpoint, load_checkpoint
from tests.support import tiny


class Drawn:
    """The arguments of the command's call to ``draw``."""

    tiles: list[Tile]
    kept: Kept
    words: dict[str, Any]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    seen, draw = Drawn(), heatmap.draw

    def spy(tiles: list[Tile], kept: Kept, **words: Any) -> Any:
        seen.tiles, seen.kept, seen.words = tiles, kept, words
        return draw(tiles, kept, **words)

    monkeypatch.setattr(heatmap, "draw", spy)
    return seen


def prefilled(model: str, image: str, method: str, budget: float) -> CompressedCache:
    checkpoint = load_checkpoint(model)
    weights = AutoModelForImageTextToText.from_pretrained(model)
    inputs = prepare(checkpoint, [open_image(image)], "What is it?")
    cache = CompressedCache(weights, recipe(method, budget=budget), inputs)
    weights.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    return cache


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(("method", "budget"), [("vl-cache", 0.2), ("elastic", 0.3)])
def test_the_plot_and_the_json_show_what_the_cache_keeps(
    run_json: Callable[..., Any],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    image: str,
    drawn: Drawn,
    family: str,
    method: str,
    budget: float,
) -> None:
    model, output = request.getfixturevalue(family), tmp_path / "kept.png"
    result = run_json(
        "inspect", "--model", model, "--image", image, "--prompt", "What is it?", "--method", method,
        "--budget", budget, "--output", output,
    )  # fmt: skip
    cache = prefilled(model, image, method, budget)
    report = cache.report()
    for layer in range(tiny.LAYERS):
        heads = cache.kept_positions(layer)[0].tolist()
        share = [sum(position in kept for kept in heads) / len(heads) for position in range(report.prompt_tokens[0])]
        assert drawn.kept.by_position[layer].tolist() == share
    assert drawn.kept.by_layer == [kept / report.prompt_tokens[0] for kept in report.kept_per_layer()]
    assert drawn.kept.sparsity == (report.sparsity and [layer[0] for layer in report.sparsity])
    assert drawn.words["title"] == f"What {method} keeps at a {budget:.0%} budget"
    assert drawn.words["subtitle"] == "“What is it?”"
    assert result == {
        "output": str(output),
        "method": method,
        "budget": budget,
        "prompt_tokens": report.prompt_tokens[0],
        "vision_tokens": report.vision_tokens[0],
        "layers": report.layers,
        "kept_per_layer": report.kept_per_layer(),
        "sparsity_per_layer": drawn.kept.sparsity,
        "entry_bytes": report.entry_bytes,
        "kv_bytes": report.bytes_held,
        "full_kv_bytes": report.full_bytes,
        "tiles": [
            {
                "name": tile.name,
                "rows": tile.tokens.shape[0],
                "columns": tile.tokens.shape[1],
                "box": list(tile.box),
            }
            for tile in drawn.tiles
        ],
    }
    assert Image.open(output).format == "PNG"


def test_what_is_recalled_is_drawn_with_the_parts_of_the_answer(
    run_json: Callable[..., Any], llava: str, image: str, tmp_path: Path, drawn: Drawn
) -> None:
    arguments = ("inspect", "--model", llava, "--image", image, "--prompt", "What is it?", "--budget", 0.3)
    run_json(*arguments, "--method", "sparsight", "--output", tmp_path / "a.png")
    assert drawn.words["moments"] == []
    run_json(*arguments, "--method", "sparsight-recall", "--output", tmp_path / "b.png")
    moments, chosen = drawn.words["moments"], recipe("sparsight-recall", budget=0.3)

    checkpoint, weights = load_checkpoint(llava), AutoModelForImageTextToText.from_pretrained(llava)
    inputs = prepare(checkpoint, [open_image(image)], "What is it?")

    def answered(tokens: int) -> tuple[CompressedCache, torch.Tensor]:
        cache = CompressedCache(weights, chosen, inputs)
        output = weights.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
        return cache, output[0, inputs["input_ids"].shape[1] :]

    _, answer = answered(command.MAX_NEW_TOKENS)
    parts = [answer[first : first + 4] for first in range(1, len(answer), 4)]
    decode = checkpoint.processor.tokenizer.decode
    assert [moment.text for moment in moments] == [decode(part, skip_special_tokens=True) for part in parts]
    for number in (0, len(moments) - 1):
        # An answer that ends with the first token after a recall.
        cache, _ = answered(2 + 4 * number)
        assert torch.equal(moments[number].by_position, command.kept_of(cache, cache.report()).by_position.mean(0))


def test_several_images_are_plotted_separately(
    run_json: Callable[..., Any], llava: str, image: str, tmp_path: Path
) -> None:
    result = run_json(
        "inspect",
        "--model",
        llava,
        "--image",
        image,
        "--image",
        image,
        "--prompt",
        "hi",
        "--output",
        tmp_path / "a.png",
    )
    tile = {"rows": 4, "columns": 4, "box": [0, 0, 1, 1]}
    assert result["tiles"] == [{"name": f"Image {number}", **tile} for number in (1, 2)]


def test_a_summary_and_the_output_file_are_printed(
    run: Callable[..., tuple[int, str, str]], llava: str, image: str, tmp_path: Path
) -> None:
    output = tmp_path / "kept.png"
    code, out, err = run("inspect", "--model", llava, "--image", image, "--prompt", "hi", "--output", output)
    assert (code, err) == (0, "")
    assert out.startswith("22 prompt tokens, 16 of them vision; a layer keeps 2.")
    assert out.endswith(f"Wrote {output}\n")


def test_qwen_is_inspected_like_the_others() -> None:
    # Its processor needs torchvision: build the inputs as it would.
    model, image_processor = tiny.qwen2_5_vl(vision_layers=1), tiny.qwen2_5_vl_image_processor()
    pixels = image_processor([Image.new("RGB", (84, 140), "red")], return_tensors="pt")
    ids = torch.tensor([[1, 2] + [model.config.image_token_id] * 15 + [3] * 6])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).int(), **pixels}
    checkpoint = Checkpoint("qwen", model.config, SimpleNamespace(image_processor=image_processor))
    (tile,) = command.tiles_of(Question("What?", checkpoint, BatchFeature(inputs), [(84, 140)]))
    assert tile.box == (0, 0, 1, 1)
    assert tile.tokens.tolist() == [[2 + 3 * row + column for column in range(3)] for row in range(5)]
    assert tile.pixels.shape == (140, 84, 3)
    cache = CompressedCache(model, recipe("vl-cache", budget=0.3), inputs)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    kept = command.kept_of(cache, cache.report())
    assert kept.by_position.shape == (tiny.LAYERS, 23)
    assert kept.by_position.sum(-1).tolist() == pytest.approx(cache.report().kept_per_layer())


def test_heads_share_their_positions() -> None:
    positions = torch.tensor([[0, 2, 3], [2, 3, -1], [1, 2, -1], [2, -1, -1]])
    assert command.share_of_heads(positions, 5).tolist() == [0.25, 0.25, 1, 0.5, 0]


@pytest.mark.parametrize("output", ["kept.jpg", "kept"])
def test_an_unwritable_output_is_refused_before_the_model_is_loaded(
    run: Callable[..., tuple[int, str, str]], image: str, tmp_path: Path, output: str
) -> None:
    path = tmp_path / output
    code, out, err = run("inspect", "--model", "/nowhere", "--image", image, "--prompt", "hi", "--output", path)
    assert (code, out) == (2, "")
    assert err == f"Error: --output must be a .png file, got {path}.\n"


def test_there_is_nothing_to_inspect_without_an_image(run: Callable[..., tuple[int, str, str]], llava: str) -> None:
    assert run("inspect", "--model", llava, "--prompt", "hi") == (
        2,
        "",
        "Error: Without an image there is nothing to inspect: give --image.\n",
    )
