"""The pixels that a tile assigns to a vision token are those that the model encodes in it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from sparsight.models.families import FAMILIES
from sparsight.models.inputs import prepare
from sparsight.models.layouts import Tile, find_tiles
from sparsight.models.loading import load_checkpoint
from tests.support import tiny

RED = (255, 0, 0)


class Family:
    """A model with its processor, of any family."""

    def __init__(self, model: PreTrainedModel, image_processor: Any, checkpoint: Any = None) -> None:
        self.model, self.image_processor, self.checkpoint = model, image_processor, checkpoint

    def inputs(self, *images: Image.Image) -> dict[str, Tensor]:
        if self.checkpoint is not None:
            return dict(prepare(self.checkpoint, images, "What is this?"))
        pixels = dict(self.image_processor(list(images), return_tensors="pt"))
        counts = pixels["image_grid_thw"].prod(-1) // 4
        ids = [1, 2]
        for count in counts.tolist():
            ids += [3] + [self.model.config.image_token_id] * count
        return {"input_ids": torch.tensor([[*ids, 4, 5]]), **pixels}

    def tiles(self, inputs: dict[str, Tensor]) -> list[Tile]:
        config = self.model.config
        return find_tiles(FAMILIES[config.model_type].layout, config, inputs, self.image_processor)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """The features of each vision token of the prompt, ``[tokens, D]``."""
        arguments = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
        with torch.no_grad():
            features = self.model.get_image_features(**arguments).pooler_output
        return torch.cat(list(features)) if isinstance(features, list | tuple) else features.flatten(0, -2)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    found = {}
    for name in ("llava", "llava_next"):
        folder = getattr(tiny, name)(tmp_path_factory.mktemp(name))
        checkpoint = load_checkpoint(str(folder))
        model = AutoModelForImageTextToText.from_pretrained(folder)
        found[name] = Family(model, checkpoint.processor.image_processor, checkpoint)
    found["qwen2_5_vl"] = Family(tiny.qwen2_5_vl(), tiny.qwen2_5_vl_image_processor())
    return found


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 200, size=(8, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


SIZES = [(56, 56), (112, 84), (60, 200), (300, 56), (40, 30)]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("size", SIZES)
def test_changing_the_pixels_of_a_cell_changes_only_its_token(
    families: dict[str, Family], name: str, size: tuple[int, int]
) -> None:
    # The tiny vision towers are read before their first attention layer: a token knows its own patch only.
    family = families[name]
    inputs = family.inputs(picture(*size))
    tiles = family.tiles(inputs)
    before = family.features(inputs)
    positions = (inputs["input_ids"][0] == family.model.config.image_token_id).nonzero()[:, 0]
    # Every element of the pixels is changed on its own; where it shows in a tile must be the token that it changes.
    pixels = inputs["pixel_values"]
    flat = pixels.reshape(-1)
    rng = np.random.default_rng(1)
    seen = set()
    for element in rng.choice(flat.numel(), 25, replace=False):
        changed = flat.clone()
        changed[element] = 1.0 if flat[element] < 0 else -1.0
        altered = inputs | {"pixel_values": changed.view_as(pixels)}
        moved = (family.features(altered) - before).abs().amax(-1) > 1e-6
        places = {
            int(old.tokens[row * len(old.tokens) // old.pixels.shape[0], column * old.tokens.shape[1] // width])
            for old, new in zip(tiles, family.tiles(altered), strict=True)
            for width in [old.pixels.shape[1]]
            for row, column in (new.pixels - old.pixels).abs().amax(-1).nonzero().tolist()
        }
        tokens = set(positions[moved].tolist())
        # A patch holds a second frame, the same as the first in a processor's output, that no tile shows.
        assert places == tokens or (name == "qwen2_5_vl" and not places)
        seen |= places
    assert len(seen) > 0.3 * min(25, sum(tile.tokens.numel() for tile in tiles))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_cover_the_vision_tokens_once_and_in_order(
    families: dict[str, Family], name: str, size: tuple[int, int]
) -> None:
    family = families[name]
    inputs = family.inputs(picture(*size), picture(90, 70, seed=1))
    tokens = torch.cat([tile.tokens.flatten() for tile in family.tiles(inputs)])
    assert (tokens.diff() > 0).all()
    positions = (inputs["input_ids"][0] == family.model.config.image_token_id).nonzero()[:, 0]
    missing = sorted(set(positions.tolist()) - set(tokens.tolist()))
    assert set(tokens.tolist()) <= set(positions.tolist())
    # LlavaNext ends the rows of its high-resolution canvas with a token that has no place.
    rows = sum(len(tile.tokens) for tile in family.tiles(inputs) if tile.name.endswith("igh-res"))
    assert len(missing) == rows


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_red_patch_is_at_its_place_in_the_tiles(families: dict[str, Family], name: str) -> None:
    family = families[name]
    image = Image.new("RGB", (112, 112), "black")
    image.paste(RED, (84, 28, 112, 56))
    for tile in family.tiles(family.inputs(image)):
        height, width, _ = tile.pixels.shape
        down, across = np.unravel_index(int(tile.pixels[..., 0].argmax()), (height, width))
        assert 0.25 <= down / height < 0.5
        assert 0.75 <= across / width < 1
        assert tile.pixels[int(height * 0.375), int(width * 0.875)].tolist() == pytest.approx([1, 0, 0], abs=0.01)
        assert tile.pixels[int(height * 0.8), int(width * 0.2)].tolist() == pytest.approx([0, 0, 0], abs=0.01)


def test_pixels_are_those_before_normalisation(families: dict[str, Family]) -> None:
    image = picture(tiny.SIDE, tiny.SIDE)
    tile = families["llava"].tiles(families["llava"].inputs(image))[0]
    assert np.abs(tile.pixels.numpy() - np.asarray(image) / 255).max() < 1e-6


def test_pixels_of_processors_that_do_not_rescale_or_normalise(families: dict[str, Family]) -> None:
    family = families["llava"]
    image = picture(tiny.SIDE, tiny.SIDE)
    inputs = family.inputs(image)
    inputs["pixel_values"] = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None]
    plain = SimpleNamespace(do_normalize=False, do_rescale=False)
    tile = find_tiles(FAMILIES["llava"].layout, family.model.config, inputs, plain)[0]
    assert np.abs(tile.pixels.numpy() - np.asarray(image) / 255).max() < 1e-6


@pytest.mark.parametrize("size", [(56, 56), (112, 84), (60, 200), (300, 56), (113, 112), (40, 30), (57, 111)])
def test_llava_next_tokens_are_those_that_transformers_packs(
    families: dict[str, Family], size: tuple[int, int]
) -> None:
    family = families["llava_next"]
    model, config = family.model, family.model.config
    images = [picture(*size), picture(90, 70, seed=1)]
    inputs = family.inputs(*images)
    # Features that name their tile and their cell show where each packed token comes from.
    cells = tiny.GRID**2
    counts = [
        image_size_to_num_patches(sides, config.image_grid_pinpoints, tiny.SIDE) for sides in inputs["image_sizes"]
    ]
    features = [torch.arange(count * cells).view(count, cells, 1) for count in counts]
    packed, lengths = model.model.pack_image_features(features, inputs["image_sizes"], "default", torch.tensor([-1]))
    first = int((inputs["input_ids"][0] == config.image_token_id).nonzero()[0])
    # Between two pictures the template puts one token.
    starts = [first, first + int(lengths[0]) + 1]
    tiles = family.tiles(inputs)
    for number, (source, start, pixels) in enumerate(zip(packed, starts, inputs["pixel_values"], strict=True)):
        base, high = tiles[2 * number : 2 * number + 2]
        assert source[base.tokens - start].view(-1).tolist() == list(range(cells))
        for tile in (base, high):
            for row, column in np.ndindex(tile.tokens.shape):
                part, cell = divmod(int(source[tile.tokens[row, column] - start]), cells)
                down, across = (index * tiny.PATCH for index in divmod(cell, tiny.GRID))
                patch = pixels[part, :, down : down + tiny.PATCH, across : across + tiny.PATCH].permute(1, 2, 0)
                mean = torch.tensor(family.image_processor.image_mean)
                shown = patch * torch.tensor(family.image_processor.image_std) + mean
                y, x = row * tiny.PATCH, column * tiny.PATCH
                torch.testing.assert_close(tile.pixels[y : y + tiny.PATCH, x : x + tiny.PATCH], shown.clamp(0, 1))


def test_names_distinguish_images_and_scales(families: dict[str, Family]) -> None:
    one, other = picture(56, 56), picture(112, 56)

    def names(family: str, *images: Image.Image) -> list[str]:
        return [tile.name for tile in families[family].tiles(families[family].inputs(*images))]

    assert names("llava", one) == [""]
    assert names("llava", one, other) == ["Image 1", "Image 2"]
    assert names("llava_next", one) == ["Base", "High-res"]
    assert names("llava_next", one, other)[2:] == ["Image 2, base", "Image 2, high-res"]


def test_seams_lie_where_high_resolution_tiles_meet(families: dict[str, Family]) -> None:
    family = families["llava_next"]
    assert [tile.seams for tile in family.tiles(family.inputs(picture(112, 112)))] == [((), ()), ((4,), (4,))]
    # One row of three tiles, of which the picture fills the width and the middle of the height.
    assert family.tiles(family.inputs(picture(300, 56)))[1].seams == ((), (4, 8))
    # Of the eight columns of two tiles the picture fills six: the first of the left tile is padding and gone.
    narrow = family.tiles(family.inputs(picture(90, 112)))[1]
    assert narrow.tokens.shape == (8, 6)
    assert narrow.seams == ((4,), (3,))


def test_a_class_token_is_in_no_tile(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(tiny.llava(tmp_path, strategy="full")))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    family = Family(model, checkpoint.processor.image_processor, checkpoint)
    inputs = family.inputs(picture(56, 56), picture(70, 56))
    first, second = family.tiles(inputs)
    positions = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    assert first.tokens.flatten().tolist() == positions[1:17]
    assert second.tokens.flatten().tolist() == positions[18:]


def test_images_of_several_sizes_are_cropped_from_their_padding(families: dict[str, Family]) -> None:
    config = families["llava"].model.config
    pixels = torch.rand(2, 3, 56, 56)
    inputs = {
        "input_ids": torch.tensor([[1] + [config.image_token_id] * 8 + [2] + [config.image_token_id] * 3]),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[28, 56], [42, 14]]),
    }
    plain = SimpleNamespace(do_normalize=False, do_rescale=True)
    first, second = find_tiles(FAMILIES["llava"].layout, config, inputs, plain)
    assert first.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert second.tokens.tolist() == [[10], [11], [12]]
    assert (second.pixels == pixels[1, :, :42, :14].permute(1, 2, 0)).all()


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_a_prompt_with_another_number_of_vision_tokens_is_refused(families: dict[str, Family], name: str) -> None:
    family = families[name]
    inputs = family.inputs(picture(56, 56))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[family.model.config.image_token_id]])], 1)
    with pytest.raises(ValueError, match=r"have \d+ vision tokens by the layout of .*, but the prompt holds \d+"):
        family.tiles(inputs)


def test_an_image_much_longer_than_wide_has_a_base_tile_only(families: dict[str, Family]) -> None:
    family = families["llava_next"]
    assert family.checkpoint is not None
    inputs = prepare(family.checkpoint, [picture(1, 200)], "hi")
    assert [tile.name for tile in family.tiles(inputs)] == ["Base"]
