"""Stage: the decoder gets used to what the eyes really see, on pictures, every skill."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sparsight.zoo.page import WIDTH as PICTURE_WIDTH
from sparsight.zoo.page import Page
from sparsight.zoo.tasks import Example, compare, look_at, look_up, read_out
from training.align import SCENE_WEIGHT, loss_and_scores, pixels
from training.loop import Run, device, report, update
from training.model import WIDTH, see
from training.prompt import batch_of
from training.read import answer_loss, draw_examples, embed
from training.targets import basis, features

SKILLS = ("look-up", "reading", "scenes", "two images")
WEIGHTS = (0.48, 0.26, 0.14, 0.12)
RELOAD_EVERY = 200
LOW_SHARE = 0.15
"""Share of the examples whose pictures have few rows."""

LOW_LEVEL = 3
"""They come from this level of the language stage's curriculum."""


def full_examples(rng: np.random.Generator, skill: str, tokens: int) -> list[Example]:
    """Examples of one skill on pictures of full height, about `tokens` tokens in all."""

    def fill(length: int) -> range:
        return range(max(1, tokens // length))

    if skill == "look-up":
        records = 64 if rng.random() < 0.4 else int(rng.integers(4, 65))
        return [look_up(rng, "train", records, min(16, records)) for _ in fill(840)]
    if skill == "reading":
        return [read_out(rng, "train", int(rng.integers(1, 21))) for _ in fill(700)]
    if skill == "scenes":
        return [look_at(rng, "train", 10) for _ in fill(740)]
    return [compare(rng, "train", int(rng.integers(2, 33)), 10, PICTURE_WIDTH) for _ in fill(1400)]


def patch_vectors(
    model: LlavaForConditionalGeneration, examples: list[Example], directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the eyes say of the examples' images, `[N, WIDTH]`, and how far that is from what is there."""
    images = [image for example in examples for image in example.images]
    vectors = see(model, pixels([image.draw() for image in images]).to(directions.device)).float()
    truth = torch.from_numpy(np.stack([features(image) for image in images])).to(directions.device)
    blur = loss_and_scores(vectors, truth, directions)[0]
    return vectors.flatten(0, 1), blur if isinstance(images[0], Page) else SCENE_WEIGHT * blur


def load_eyes(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Take over tower and projector as the alignment stage last saved them."""
    saved = torch.load(path, map_location="cpu", weights_only=True)["model"]
    torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector]).load_state_dict(saved)


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
    """Train the decoder for `total` steps on what the eyes see whose stage saves itself in the file `eyes`.

    They are read again from time to time: the two stages may run at the same time.
    """
    decoder = model.model.language_model.parameters()
    optimizer = torch.optim.AdamW(decoder, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    run = Run(path, model, optimizer)
    directions = basis(WIDTH).to(device())
    for step in run.steps(total, peak, warmup=40):
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
            with torch.no_grad():
                vectors, blur = patch_vectors(model, examples, directions)
            embedded = embed(model, batch.ids.to(device()), vectors, model.config.image_token_id)
            loss, right = answer_loss(model, embedded, batch.labels.to(device()))
        update(optimizer, loss)
        run.notes[skill] = 0.95 * run.notes.get(skill, right) + 0.05 * right
        run.notes["blur"] = 0.95 * run.notes.get("blur", blur.item()) + 0.05 * blur.item()
        if step % 20 == 0:
            report("adapt", step, seconds=run.cpu_seconds, loss=loss.item(), **run.notes)
