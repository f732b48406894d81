"""The generators: the same seed gives the same image, and the splits share no page."""

import numpy as np
import pytest

from sparsight.reader.page import MAX_ANGLE, WIDTH, is_held_out, random_page
from sparsight.reader.scene import random_scene
from sparsight.reader.skills import Example, compare, look_at, look_up, read_out

MAKERS = (look_up, read_out, look_at, compare)


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_seed_gives_the_same_example(make):
    first, second = (make(np.random.default_rng(5), "heldout") for _ in range(2))
    assert first == second
    for one, other in zip(first.pictures(), second.pictures(), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("make", MAKERS)
def test_another_seed_gives_another_example(make):
    assert make(np.random.default_rng(5), "heldout") != make(np.random.default_rng(6), "heldout")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_page_or_scene_belongs_to_one_split_by_its_content(split):
    rng = np.random.default_rng(1)
    for count in (1, 2, 64):
        assert is_held_out(random_page(rng, count, split).records) == (split == "heldout")
    assert is_held_out(random_scene(rng, split).things) == (split == "heldout")


def test_characters_are_on_the_page_and_not_aligned_with_the_grid():
    rng = np.random.default_rng(2)
    phases = []
    for count in (1, 20, 64):
        page = random_page(rng, count)
        for _, x, y in page.centres():
            assert 0 < x < WIDTH and 0 < y < WIDTH
            phases.append(y % 14)
    assert np.histogram(phases, bins=7, range=(0, 14))[0].min() > 0


def test_a_page_shows_its_records_and_keys_are_distinct():
    page = random_page(np.random.default_rng(3), 64)
    assert len({key for key, _ in page.records}) == 64
    printed = "".join(glyph.char for glyph in page.glyphs)
    for key, value in page.records:
        assert key in printed and value in printed


def test_styles_are_varied():
    styles = [random_page(np.random.default_rng(seed), 4).style for seed in range(80)]
    assert len({style.face for style in styles}) >= 4
    assert {sum(style.ink) > sum(style.paper) for style in styles} == {True, False}
    assert any(style.noise for style in styles) and any(style.angle for style in styles)
    assert all(abs(style.angle) <= MAX_ANGLE for style in styles)


def test_ink_is_at_the_centres_of_the_characters():
    page = random_page(np.random.default_rng(4), 40)
    grey = np.asarray(page.draw(), dtype=float).mean(-1)
    paper = sum(page.style.paper) / 3
    near = np.zeros_like(grey, dtype=bool)
    for _, x, y in page.centres():
        near[max(0, int(y) - 7) : int(y) + 8, max(0, int(x) - 6) : int(x) + 7] = True
    assert np.abs(grey - paper)[~near].mean() < 0.1 * np.abs(grey - paper)[near].mean() + 8


def test_questions_about_scenes_have_the_answers_of_the_scene():
    for seed in range(40):
        example = look_at(np.random.default_rng(seed), "heldout", questions=6)
        shapes = [thing.shape for thing in example.images[0].things]
        for question, answer in example.turns:
            if "shapes" in question:
                assert answer == str(len(shapes))
            elif "color" in question:
                asked = next(shape for shape in shapes if shape in question)
                assert answer == example.images[0].things[shapes.index(asked)].color


def test_transcripts_go_down_the_page():
    example = read_out(np.random.default_rng(0), "heldout", 20)
    page = example.images[0]
    lines = [f"{number:02d}. {key} {value}" for number, (key, value) in enumerate(page.records, 1)]
    assert example.turns[0][1] == "\n".join([*lines, "21. END"])
    starts = [glyph.y for glyph in page.glyphs]
    assert starts == sorted(starts)


def test_questions_about_two_images_name_one_of_them():
    example = compare(np.random.default_rng(0), "heldout", questions=8)
    assert isinstance(example, Example) and len(example.images) == 2
    assert {("first" in question) + 2 * ("second" in question) for question, _ in example.turns} == {1, 2}
