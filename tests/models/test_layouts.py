"""Every family's layout agrees with its processor's token order and with the pixels that its model encodes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from sparsight import CompressedCache, recipe
from sparsight.models.families import FAMILIES
from sparsight.models.layouts import find_tiles
from sparsight.models.prompt import locate
from tests.support import families, models
from tests.support.families import IMAGE_END, IMAGE_TOKEN, PATCH, ROW_END, SIDE, TINY
from tests.support.processors import REAL, processor

PLAIN = SimpleNamespace(do_normalize=False, do_rescale=True)
ARGUMENTS = ("pixel", "image", "target", "batch_num")


def tiles_of(model, inputs, image_processor=PLAIN, config=None):
    return find_tiles(FAMILIES[model.config.model_type].layout, config or model.config, inputs, image_processor)


@torch.no_grad()
def features_of(model, inputs):
    """The features of each vision token, ``[tokens, D]``."""
    arguments = {name: value for name, value in inputs.items() if name.startswith(ARGUMENTS)}
    features = model.get_image_features(**arguments).pooler_output
    return torch.cat(list(features)) if isinstance(features, list | tuple) else features.flatten(0, -2)


def short_sighted(family):
    """A model without attention in its vision tower: a token depends on its own patches only."""
    model = models.fresh_model(family)
    for module in model.modules():
        for name in ("out_proj", "o_proj", "proj", "projection_layer"):
            projection = getattr(module, name, None)
            if "Attention" in type(module).__name__ and isinstance(projection, nn.Linear):
                nn.init.zeros_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
    return model


def changes(model, inputs, count=30):
    """For pixels changed one by one: the tokens whose features changed, and the tokens of the pixel's cells."""
    before, tiles = features_of(model, inputs), tiles_of(model, inputs)
    positions = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    pixels = inputs["pixel_values"]
    for element in np.random.default_rng(1).choice(pixels.numel(), count, replace=False):
        changed = pixels.flatten().clone()
        changed[element] = 1.0 if changed[element] < 0.5 else 0.0
        altered = {**inputs, "pixel_values": changed.view_as(pixels)}
        moved = (features_of(model, altered) - before).abs().amax(-1) > 1e-6
        shown = set()
        for old, new in zip(tiles, tiles_of(model, altered), strict=True):
            cells = [length // count for length, count in zip(old.pixels.shape[:2], old.tokens.shape, strict=True)]
            for row, column in (new.pixels - old.pixels).abs().amax(-1).nonzero().tolist():
                shown.add(int(old.tokens[row // cells[0], column // cells[1]]))
        yield set(positions[moved].tolist()), shown


@pytest.mark.parametrize("family", TINY)
def test_changing_a_pixel_changes_only_the_token_of_its_cell(family):
    model, inputs = short_sighted(family), models.inputs(family, models.Prompt(images=2, before=3, after=4))
    inputs["pixel_values"] = inputs["pixel_values"].clamp(-2, 2) / 4 + 0.5
    seen = set()
    for tokens, shown in changes(model, inputs):
        # A patch of Qwen's or GLM's holds a second frame, the same as the first in a processor's output, that is not
        # shown.
        assert shown == tokens or ("image_grid_thw" in inputs and not shown)
        seen |= shown
    assert len(seen) > 5


@pytest.mark.parametrize("family", TINY)
def test_tiles_cover_the_vision_tokens_once_and_in_order(family):
    model, inputs = models.model(family), models.inputs(family, models.Prompt(images=2, before=3, after=4))
    tokens = torch.cat([tile.tokens.flatten() for tile in tiles_of(model, inputs)])
    assert (tokens.diff() > 0).all()
    positions = locate(model.config, inputs).vision_mask[0].nonzero()[:, 0].tolist()
    # The rows of a high-resolution canvas end in a token that has no place.
    ends = 2 * SIDE // PATCH if "image_sizes" in inputs and family != "mistral3" else 0
    assert set(tokens.tolist()) <= set(positions)
    assert len(tokens) == len(positions) - ends


def picture(width, height):
    """A black image with a red patch in the second row and the last column of quarters."""
    image = Image.new("RGB", (width, height), "black")
    image.paste((255, 0, 0), (3 * width // 4, height // 4, width, height // 2))
    return image


def processed(family, *images):
    """A real processor's output for images and a question, the processor, and the model's config with its token."""
    real, made = REAL[family], processor(family)
    text = f"see {real.placeholder}" * len(images) + " what?"
    nested = family == "gemma3" or (family == "llava_onevision" and len(images) > 1)
    inputs = made(images=[list(images)] if nested else list(images), text=text, return_tensors="pt")
    config = copy.deepcopy(models.model(family).config)
    config.image_token_id = made.tokenizer.convert_tokens_to_ids(real.token)
    return dict(inputs), made, config


SIZES = [(28, 28), (56, 30), (30, 100)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", REAL)
def test_layouts_agree_with_real_processors(family, size):
    inputs, made, config = processed(family, picture(*size), picture(60, 40))
    prompt = locate(config, inputs)
    assert int(prompt.vision_mask.sum()) == len(features_of(models.model(family), inputs))
    # The question and what follows the picture, but no vision token.
    after = inputs["input_ids"][0, prompt.spans[0].post_vision :].tolist()
    assert made.tokenizer.decode(after).strip().removesuffix("\n").endswith("what?")
    assert config.image_token_id not in after
    tokens = torch.cat(
        [tile.tokens.flatten() for tile in tiles_of(models.model(family), inputs, made.image_processor, config)]
    )
    assert prompt.vision_mask[0, tokens].all()


@pytest.mark.parametrize("family", REAL)
def test_a_processors_output_is_accepted_by_a_cache(family):
    inputs, made, config = processed(family, picture(56, 30), picture(40, 60))
    model = models.fresh_model(family)
    model.resize_token_embeddings(len(made.tokenizer))
    model.config.image_token_id = config.image_token_id
    cache = CompressedCache(model, recipe("vl-cache", budget=1.0), inputs)
    expected = models.generate(model, inputs, 5)
    assert torch.equal(models.generate(model, inputs, 5, past_key_values=cache), expected)
    assert cache.report().vision_tokens == [len(features_of(model, inputs))]


@pytest.mark.parametrize("family", REAL)
def test_a_red_patch_is_at_its_place_in_the_tiles(family):
    inputs, made, config = processed(family, picture(56, 56))
    # The whole picture is a tile of its own somewhere; Idefics3 and InternVL put it last.
    tiles = tiles_of(models.model(family), inputs, made.image_processor, config)
    tile = tiles[-1 if family in ("internvl", "idefics3", "aya_vision") else 0]
    height, width, _ = tile.pixels.shape
    down, across = np.unravel_index(int((tile.pixels[..., 0] - tile.pixels[..., 1]).argmax()), (height, width))
    assert 0.2 <= down / height < 0.55
    assert 0.7 <= across / width < 1
    assert tile.pixels[int(height * 0.8), int(width * 0.2)].tolist() == pytest.approx([0, 0, 0], abs=0.02)


@pytest.mark.parametrize("sizes", [[(28, 56), (42, 14)], [(56, 56)]])
def test_mistral3_merges_patches_of_images_of_several_sizes(sizes):
    images = PixtralImageProcessorPil(patch_size=2 * PATCH, size={"longest_edge": 4 * SIDE})
    pixels = dict(images([picture(width, height) for height, width in sizes], return_tensors="pt"))
    ids = [5]
    for height, width in pixels["image_sizes"].tolist():
        ids += ([IMAGE_TOKEN] * (width // (2 * PATCH)) + [ROW_END]) * (height // (2 * PATCH))
        ids[-1] = IMAGE_END
    inputs = {"input_ids": torch.tensor([[*ids, 6, 7]]), **pixels}
    model = models.model("mistral3")
    tiles = tiles_of(model, inputs, images)
    assert [tuple(tile.tokens.shape) for tile in tiles] == [(h // 14, w // 14) for h, w in sizes]
    assert sum(tile.tokens.numel() for tile in tiles) == len(features_of(model, inputs))
    assert [tuple(tile.pixels.shape[:2]) for tile in tiles] == sizes


def onevision(pinpoints, most):
    """LlavaOnevision with other canvases and another limit of tiles."""
    model = short_sighted("llava_onevision")
    model.config.image_grid_pinpoints, model.config.vision_aspect_ratio = pinpoints, f"anyres_max_{most}"
    return model


@pytest.mark.parametrize(("side", "grid", "seams"), [(2, (4, 4), ((2,), (2,))), (3, (4, 4), ((1, 3), (1, 3)))])
def test_a_canvas_with_too_many_tokens_is_scaled_down(side, grid, seams):
    model = onevision([[side * SIDE, side * SIDE]], most=1)
    pixels = torch.zeros(1, 1 + side**2, 3, SIDE, SIDE)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[100, 100]])}
    count = len(features_of(model, inputs))
    assert count == 16 + grid[0] * (grid[1] + 1)
    inputs["input_ids"] = torch.tensor([[IMAGE_TOKEN] * count + [5]])
    # The tile in the lower right corner lights up: so does the corner of the canvas, and its tokens.
    lit = {**inputs, "pixel_values": pixels.clone()}
    lit["pixel_values"][0, -1] = 1
    high = tiles_of(model, lit)[1]
    assert high.tokens.shape == grid
    assert high.seams == seams
    assert high.pixels[-1, -1].tolist() == [1, 1, 1]
    assert high.pixels[0, 0].tolist() == [0, 0, 0]
    moved = (features_of(model, lit) - features_of(model, inputs)).abs().amax(-1) > 1e-6
    bright = high.pixels.unflatten(0, (grid[0], -1)).unflatten(2, (grid[1], -1)).mean((1, 3, 4)) > 0.5
    assert moved[high.tokens][bright].all()
    assert not moved[high.tokens][:2, :2].any()


def test_several_images_of_llava_onevision_have_base_tiles_only():
    inputs, made, config = processed("llava_onevision", picture(56, 30), picture(30, 60))
    tiles = tiles_of(models.model("llava_onevision"), inputs, made.image_processor, config)
    assert [(tile.name, tuple(tile.tokens.shape)) for tile in tiles] == [("Image 1", (4, 4)), ("Image 2", (4, 4))]
    assert tiles[1].tokens[0, 0] > tiles[0].tokens[-1, -1] + 1


def test_slices_with_less_merging():
    model = short_sighted("minicpmv4_6")
    model.config.downsample_mode = "4x"
    medium = families.TINY["minicpmv4_6"].image(torch.Generator().manual_seed(0), torch.float32)
    inputs = {"input_ids": torch.tensor([[IMAGE_TOKEN] * 24]), **medium.pixels}
    inputs["pixel_values"] = inputs["pixel_values"].clamp(-2, 2) / 4 + 0.5
    assert [tuple(tile.tokens.shape) for tile in tiles_of(model, inputs)] == [(4, 4), (2, 4)]
    assert all(tokens == shown for tokens, shown in changes(model, inputs))


@pytest.mark.parametrize("family", TINY)
def test_grids_of_a_batch_equal_those_of_each_prompt_alone(family):
    model = models.model(family)
    prompts = (models.ONE_IMAGE, models.THREE_IMAGES, models.NO_TEXT_AFTER, models.NO_IMAGE)
    together = locate(model.config, models.inputs(family, *prompts), grids=True)
    for row, prompt in enumerate(prompts):
        inputs = models.inputs(family, prompt)
        alone = locate(model.config, inputs, grids=True)
        start = together.spans[row].start
        assert [(grid - start).tolist() for grid in together.grids[row]] == [grid.tolist() for grid in alone.grids[0]]
        tokens = [tile.tokens.flatten().tolist() for tile in tiles_of(model, inputs)] if prompt.images else []
        assert [grid.flatten().tolist() for grid in alone.grids[0]] == tokens
        assert alone.vision_mask[0, [place for grid in tokens for place in grid]].all()


def test_a_text_model_and_a_video_have_no_grids():
    text = locate(models.model("llama").config, models.inputs("llama", models.NO_IMAGE), grids=True)
    assert text.grids == ((),)
    config = models.model("qwen2_vl").config
    assert locate(config, models.inputs("qwen2_vl", models.ONE_VIDEO), grids=True).grids == ((),)
