"""Stage `read`: train the decoder on every skill, with the target vectors in place of vision features."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sparsight.reader.page import GLYPHS, PATCH
from sparsight.reader.scene import COLORS, SHAPES
from sparsight.reader.skills import HARD_KINDS, SCENE_KINDS, Example, compare, look_at, look_up, plural, read_out
from training.loop import Run, device, optimizers, report, update
from training.model import WIDTH
from training.prompt import Batch, batch_of, repetition
from training.targets import FIRST_COLOR, FIRST_SHAPE, basis, features, token_meaning

LEVELS = ((2, 3), (3, 6), (4, 10), (6, 16), (12, 32), (24, 64))
"""Rows of patches and most records of a page, by level; the level rises when look-up is mastered."""

MASTERED = 0.92
HARD_SHARE = 0.7
"""Share of the scenes with only the hardest questions: counting, and left or right of."""

PAGES = 0.45
"""Share of pages among pairs of images; counting in one scene of a pair is learned later than look-up."""

SKILLS = ("look-up", "reading", "scenes", "two images", "repetition")


def weights(level: int) -> list[float]:
    """Probability of each skill."""
    early = level < 2
    return [0.44, 0.16, 0.1, 0.05, 0.25] if early else [0.25, 0.28, 0.35, 0.12, 0.0]


def scene_kinds(rng: np.random.Generator) -> tuple[str, ...]:
    """The kinds of questions about a scene."""
    return HARD_KINDS if rng.random() < HARD_SHARE else SCENE_KINDS


def draw_examples(rng: np.random.Generator, skill: str, level: int, tokens: int) -> list[Example]:
    """Examples of one skill at a level of the curriculum or below, about `tokens` tokens in total."""
    rows, most = LEVELS[level if rng.random() < 0.8 else rng.integers(level + 1)]
    height = rows * PATCH

    def fill(length: int) -> range:
        return range(max(1, tokens // length))

    if skill == "look-up":
        records = int(rng.integers(max(2, most // 2), most + 1))
        questions = min(12, 2 * records)
        return [look_up(rng, "train", records, questions, height) for _ in fill(rows * 24 + questions * 17)]
    if skill == "reading":
        records = int(rng.integers(1, min(most, 20) + 1))
        # One more line for END, and one for the margins.
        height = max(height, (records + 2) * PATCH)
        return [read_out(rng, "train", records, height) for _ in fill(height // PATCH * 24 + records * 11)]
    if skill == "scenes":
        height = int(rng.choice([56, 112])) if rng.random() < 0.8 or level < 4 else 336
        return [look_at(rng, "train", 8, height, scene_kinds(rng)) for _ in fill(height // PATCH * 24 + 100)]
    records = int(rng.integers(2, min(most, 16) + 1))
    rows = max(8, min(rows, 12))
    return [compare(rng, "train", records, 8, rows * PATCH, PAGES, scene_kinds(rng)) for _ in fill(rows * 48 + 160)]


def embed(model: Any, ids: torch.Tensor, vectors: torch.Tensor | None, image_token: int) -> torch.Tensor:
    """Token embeddings `[B, T, WIDTH]` with the patches' `vectors` `[N, WIDTH]` at the image tokens."""
    embedded = model.get_input_embeddings()(ids.clamp(0))
    if vectors is None:
        return embedded
    return embedded.masked_scatter((ids == image_token)[..., None], vectors.to(embedded.dtype))


def answer_loss(model: Any, embedded: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean loss on the answers' tokens, and the fraction of them predicted right."""
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    at = labels >= 0
    logits = model.lm_head(hidden[at]).float()
    wanted = labels[at]
    return functional.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean().item()


def packed_vectors(rng: np.random.Generator, examples: list[Example], directions: torch.Tensor) -> torch.Tensor:
    """The target vectors of the examples' patches with a little noise, `[N, WIDTH]`."""
    shown = np.concatenate([features(image) for example in examples for image in example.images])
    exact = torch.from_numpy(shown).to(directions.device) @ directions
    noise = torch.from_numpy(rng.standard_normal(tuple(exact.shape), dtype=np.float32)).to(exact.device)
    return exact + rng.uniform(0, 0.02) * noise


def learn_to_read(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    total: int,
    tokens: int,
    peak: float,
    seed: int,
) -> None:
    """Train the decoder for `total` steps; the vision tower is not used."""
    decoder = torch.nn.ModuleList([model.model.language_model])
    run = Run(path, decoder, optimizers(decoder))
    directions = basis(WIDTH).to(device())
    image_token = model.config.image_token_id
    for step in run.steps(total, peak):
        rng = np.random.default_rng([seed, step])
        level = int(run.notes.get("level", 0))
        skill = SKILLS[rng.choice(len(SKILLS), p=weights(level))]
        vectors = None
        batch: Batch
        if skill == "repetition":
            length = int(rng.integers(40, 120))
            batch = repetition(rng, tokenizer, max(1, tokens // (2 * length)), length)
        else:
            examples = draw_examples(rng, skill, level, tokens)
            batch = batch_of(tokenizer, examples)
            vectors = packed_vectors(rng, examples, directions)
        with torch.autocast(device().type, torch.bfloat16):
            embedded = embed(model, batch.ids.to(device()), vectors, image_token)
            loss, right = answer_loss(model, embedded, batch.labels.to(device()))
        update(run.optimizers, loss)
        run.notes[skill] = 0.95 * run.notes.get(skill, 0.0) + 0.05 * right
        if run.notes.get("look-up", 0.0) > MASTERED and level + 1 < len(LEVELS):
            run.notes |= {"level": level + 1, "look-up": 0.5}
        if step % 50 == 0:
            report("read", step, seconds=run.cpu_seconds, loss=loss.item(), **run.notes)


def init_embeddings(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Initialise each token's embedding with the mean direction of the patches that show it."""
    directions = basis(WIDTH)
    table: Any = model.get_input_embeddings().weight
    with torch.no_grad():
        table.mul_(WIDTH**-0.5 / table.std())
        for char in GLYPHS:
            table[tokenizer.convert_tokens_to_ids(char)] = token_meaning(directions, char)
        for word, feature in named_features():
            for spelling in (word, f" {word}"):
                table[tokenizer.convert_tokens_to_ids(spelling)] += directions[feature]


def named_features() -> list[tuple[str, int]]:
    """Words for shapes and colours, each with the index of its feature."""
    shapes = [(word, FIRST_SHAPE + i) for i, shape in enumerate(SHAPES) for word in (shape, plural(shape))]
    return shapes + [(color, FIRST_COLOR + i) for i, color in enumerate(COLORS)]
