"""Stage `adapt`: train the decoder on the vision tower's actual outputs, on rendered images of every skill."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sparsight.reader.page import WIDTH as PICTURE_WIDTH
from sparsight.reader.skills import Example, compare, look_at, look_up, read_out
from training.align import pixels
from training.loop import Run, device, optimizers, report, update
from training.model import see
from training.prompt import batch_of
from training.read import PAGES, answer_loss, draw_examples, embed, scene_kinds

SKILLS = ("look-up", "reading", "scenes", "two images")
WEIGHTS = (0.2, 0.34, 0.16, 0.3)
RELOAD_EVERY = 100
LOW_SHARE = 0.5
"""Share of the examples with low images, of few rows of patches."""

LOW_LEVEL = 3
"""Level of the curriculum of stage `read` that low images are drawn from."""


def full_examples(rng: np.random.Generator, skill: str, tokens: int) -> list[Example]:
    """Examples of one skill on images of full height, about `tokens` tokens in total."""

    def fill(length: int) -> range:
        return range(max(1, tokens // length))

    if skill == "look-up":
        records = 64 if rng.random() < 0.4 else int(rng.integers(4, 65))
        return [look_up(rng, "train", records, min(16, records)) for _ in fill(840)]
    if skill == "reading":
        return [read_out(rng, "train", int(rng.integers(1, 21))) for _ in fill(740)]
    if skill == "scenes":
        return [look_at(rng, "train", 10, kinds=scene_kinds(rng)) for _ in fill(740)]
    records = int(rng.integers(2, 33))
    return [compare(rng, "train", records, 10, PICTURE_WIDTH, PAGES, scene_kinds(rng)) for _ in fill(1400)]


def load_eyes(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Load the vision tower and projector from the last checkpoint of stage `align`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)["model"]
    torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector]).load_state_dict(saved)


@torch.no_grad()
def vision_features(model: LlavaForConditionalGeneration, examples: list[Example]) -> torch.Tensor:
    """The projected patch features of the examples' images, `[N, WIDTH]`."""
    pictures = [picture for example in examples for picture in example.pictures()]
    return see(model, pixels(pictures).to(device())).flatten(0, 1)


def adapt(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    total: int,
    tokens: int,
    peak: float,
    seed: int,
    eyes: Path,
) -> None:
    """Train the decoder for `total` steps on the features of the vision tower saved in the file `eyes`.

    The file is reloaded every `RELOAD_EVERY` steps, so that stage `align` may still be running.
    """
    run = Run(path, model, optimizers(model.model.language_model))
    for step in run.steps(total, peak):
        if step % RELOAD_EVERY == 0:
            load_eyes(model, eyes)
        rng = np.random.default_rng([seed, step])
        skill = SKILLS[rng.choice(len(SKILLS), p=WEIGHTS)]
        if rng.random() < LOW_SHARE:
            examples = draw_examples(rng, skill, LOW_LEVEL, tokens)
        else:
            examples = full_examples(rng, skill, tokens)
        batch = batch_of(tokenizer, examples)
        with torch.autocast(device().type, torch.bfloat16):
            vectors = vision_features(model, examples)
            embedded = embed(model, batch.ids.to(device()), vectors, model.config.image_token_id)
            loss, right = answer_loss(model, embedded, batch.labels.to(device()))
        update(run.optimizers, loss)
        run.notes[skill] = 0.95 * run.notes.get(skill, right) + 0.05 * right
        if step % 20 == 0:
            report("adapt", step, seconds=run.cpu_seconds, loss=loss.item(), **run.notes)
