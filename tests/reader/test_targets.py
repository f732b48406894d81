"""Target features of patches, compared with the page."""

import numpy as np
import torch

from sparsight.reader.page import GLYPHS, random_page
from sparsight.reader.scene import random_scene
from training.targets import (
    BASE,
    FEATURES,
    FIRST_GLYPH,
    FIRST_SHAPE,
    SLOTS,
    THING_WEIGHT,
    basis,
    features,
    split_weight,
)


def test_directions_are_orthonormal():
    directions = basis(256)
    assert directions.shape == (FEATURES, 256)
    torch.testing.assert_close(directions @ directions.T, torch.eye(FEATURES), atol=1e-5, rtol=0)


def test_every_character_has_a_total_weight_of_one():
    page = random_page(np.random.default_rng(0), 64)
    shown = features(page)[:, FIRST_GLYPH:FIRST_SHAPE].reshape(576, SLOTS, len(GLYPHS)).sum((0, 1))
    printed = [glyph.char for glyph in page.glyphs]
    np.testing.assert_allclose(shown, [printed.count(char) for char in GLYPHS], atol=1e-3)


def test_every_thing_has_a_total_weight_of_one():
    scene = random_scene(np.random.default_rng(0))
    table = features(scene)
    assert np.isclose(table[:, FIRST_SHAPE:].sum(), 2 * THING_WEIGHT * len(scene.things), atol=1e-4)
    assert (table[:, BASE] == 1).all()


def test_weights_sum_to_one_and_ramp_at_borders():
    for position in np.linspace(0.01, 3.99, 200):
        assert np.isclose(sum(weight for _, weight in split_weight(position, 0.2)), 1)
    assert split_weight(2.0, 0.2) == [(2, 0.5), (1, 0.5)]
