"""Examples of each skill: images with a conversation of questions and answers about them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sparsight.reader.listing import END, numbered, random_list
from sparsight.reader.page import WIDTH, Page, random_page
from sparsight.reader.receipt import MOST_RECORDS, random_receipt
from sparsight.reader.scene import COLORS, SHAPES, Scene, Thing, random_scene

Turn = tuple[str, str]

LOOK_UP = (
    "What is the value of {key}?",
    "What does {key} say?",
    "Which number stands next to {key}?",
    "Find {key} on the page.",
    "Look up {key}.",
    "How much is {key}?",
)
READ = ("Read the page.", "Read out the records.", "Read the page out loud.", "What does the page say?")
COLOR_OF = ("What color is the {shape}?", "Which color does the {shape} have?", "What is the color of the {shape}?")
SHAPE_OF = ("What shape is the {color} one?", "Which shape is {color}?", "What is the shape of the {color} thing?")
HOW_MANY = ("How many {things} are there?", "How many {things} do you see?", "Count the {things}.")
WHICH_SIDE = ("Is the {one} left or right of the {other}?", "Is the {one} on the left or right side of the {other}?")
WHICH_IMAGE = ("In the {nth} image: {question}", "{question} Look at the {nth} image.")
SCENE_KINDS = ("number", "color", "shape", "side")
HARD_KINDS = ("number", "side")
FIXED = ("left", "right", "first", "second", "things", "shapes")
PHRASES = (*LOOK_UP, *READ, *COLOR_OF, *SHAPE_OF, *HOW_MANY, *WHICH_SIDE, *WHICH_IMAGE, *FIXED)


@dataclass(frozen=True)
class Example:
    """Images in the order of the prompt, and the questions about them with their answers."""

    images: tuple[Page | Scene, ...]
    turns: tuple[Turn, ...]

    def pictures(self) -> list[Image.Image]:
        """The rendered images."""
        return [image.draw() for image in self.images]


def pick(rng: np.random.Generator, phrasings: tuple[str, ...], **words: str) -> str:
    """One of the phrasings, with its placeholders filled in."""
    return phrasings[rng.integers(len(phrasings))].format(**words)


def ask_page(rng: np.random.Generator, page: Page, count: int) -> list[Turn]:
    """`count` look-up questions; no record is repeated before all have been used."""
    order = np.concatenate([rng.permutation(len(page.records)) for _ in range(-(-count // len(page.records)))])
    return [(pick(rng, LOOK_UP, key=page.records[i][0]), page.records[i][1]) for i in order[:count]]


def plural(word: str) -> str:
    """The plural of a shape's name."""
    return word + ("es" if word.endswith("s") else "s")


def ask_scene(rng: np.random.Generator, scene: Scene, count: int, kinds: tuple[str, ...] = SCENE_KINDS) -> list[Turn]:
    """`count` questions that cycle through those of the kinds with one right answer in this scene."""
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color for thing in scene.things]
    lone_shape = [t for t in scene.things if shapes.count(t.shape) == 1]
    lone_color = [t for t in scene.things if colors.count(t.color) == 1]
    apart = [(a, b) for a in lone_shape for b in lone_shape if abs(a.x - b.x) > 40]

    def one(things: list[Thing]) -> Thing:
        return things[rng.integers(len(things))]

    def color() -> Turn:
        thing = one(lone_shape)
        return pick(rng, COLOR_OF, shape=thing.shape), thing.color

    def shape() -> Turn:
        thing = one(lone_color)
        return pick(rng, SHAPE_OF, color=thing.color), thing.shape

    def number() -> Turn:
        kind = rng.random()
        if kind < 0.4:
            return pick(rng, HOW_MANY, things="shapes"), str(len(scene.things))
        if kind < 0.7:
            asked = one(list(scene.things)).shape if rng.random() < 0.8 else SHAPES[rng.integers(len(SHAPES))]
            return pick(rng, HOW_MANY, things=plural(asked)), str(shapes.count(asked))
        names = list(COLORS)
        asked = one(list(scene.things)).color if rng.random() < 0.8 else names[rng.integers(len(names))]
        return pick(rng, HOW_MANY, things=f"{asked} things"), str(colors.count(asked))

    def side() -> Turn:
        a, b = apart[rng.integers(len(apart))]
        return pick(rng, WHICH_SIDE, one=a.shape, other=b.shape), "left" if a.x < b.x else "right"

    possible: dict[str, Callable[[], Turn]] = {"number": number}
    possible |= {"color": color} if lone_shape else {}
    possible |= {"shape": shape} if lone_color else {}
    possible |= {"side": side} if apart else {}
    askers = [ask for kind, ask in possible.items() if kind in kinds]
    start = rng.integers(len(askers))
    return [askers[(start + i) % len(askers)]() for i in range(count)]


def look_up(
    rng: np.random.Generator, split: str, records: int = 32, questions: int = 1, height: int = WIDTH
) -> Example:
    """Questions about a page of `records` records; a short page may be a receipt or a form."""
    if height == WIDTH and records <= MOST_RECORDS and rng.random() < 0.3:
        page = random_receipt(rng, records, split)
    else:
        page = random_page(rng, records, split, height)
    return Example((page,), tuple(ask_page(rng, page, questions)))


def read_out(rng: np.random.Generator, split: str, records: int = 20, height: int = WIDTH) -> Example:
    """A numbered list to transcribe from top to bottom, one line "01. KQ 482" per record and the END line."""
    page = random_list(rng, records, split, height)
    rows = [*(f"{key} {value}" for key, value in page.records), END]
    text = "\n".join(f"{numbered(i)} {row}" for i, row in enumerate(rows, 1))
    return Example((page,), ((pick(rng, READ), text),))


def look_at(
    rng: np.random.Generator,
    split: str,
    questions: int = 1,
    height: int = WIDTH,
    kinds: tuple[str, ...] = SCENE_KINDS,
) -> Example:
    """Questions about a scene."""
    scene = random_scene(rng, split, height)
    return Example((scene,), tuple(ask_scene(rng, scene, questions, kinds)))


def compare(
    rng: np.random.Generator,
    split: str,
    records: int = 16,
    questions: int = 1,
    height: int = WIDTH,
    pages: float = 0.65,
    kinds: tuple[str, ...] = SCENE_KINDS,
) -> Example:
    """Two images, each a page with probability `pages`, else a scene, and questions that name one of them."""
    images: list[Page | Scene] = []
    for _ in range(2):
        if rng.random() < pages:
            images.append(random_page(rng, records, split, height))
        else:
            images.append(random_scene(rng, split, height))
    turns = []
    for _ in range(questions):
        which = int(rng.integers(2))
        image = images[which]
        question, answer = (ask_page(rng, image, 1) if isinstance(image, Page) else ask_scene(rng, image, 1, kinds))[0]
        turns.append((pick(rng, WHICH_IMAGE, nth=("first", "second")[which], question=question), answer))
    return Example(tuple(images), tuple(turns))
