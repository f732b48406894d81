"""Stage `align`: train the vision tower and the projector, without the decoder, to describe each patch."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from sparsight.reader.page import PATCH, Page, random_page, random_print
from sparsight.reader.scene import Scene, random_scene
from training.loop import Run, device, optimizers, report, update
from training.model import WIDTH, see
from training.targets import FEATURES, FIRST_GLYPH, FIRST_SHAPE, GRID, THING_WEIGHT, basis, features

SHARPNESS = 8.0
SCENE_SHARE = 0.25
SCENE_WEIGHT = 6.0
"""Weight of a scene's loss: few of its patches show anything, compared with the characters of a page."""


PARTS = (
    ("glyphs", FIRST_GLYPH, FIRST_SHAPE),
    ("things", FIRST_SHAPE, FEATURES),
)
"""Kinds of features with separate error rates: name, first index and end index."""


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Images as the image processor returns them: `[B, 3, H, 336]` in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(rng: np.random.Generator, patches: int) -> list[Page | Scene]:
    """Images of one height, about `patches` patches in total: scenes, dense print and pages."""
    rows = int(rng.choice([4, 8, 24], p=[0.7, 0.15, 0.15]))
    height = rows * PATCH
    images: list[Page | Scene] = []
    for _ in range(max(1, patches // (rows * GRID))):
        kind = rng.random()
        if kind < SCENE_SHARE:
            images.append(random_scene(rng, height=height))
        elif kind < 0.7:
            images.append(random_print(rng, height))
        else:
            images.append(random_page(rng, int(rng.integers(1, (64 if rows == 24 else 3 * rows) + 1)), height=height))
    return images


def loss_and_scores(
    said: torch.Tensor, truth: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error of the patch vectors plus a cross-entropy on each character and shape, for each image.

    `said` is `[B, P, WIDTH]`, `truth` `[B, P, FEATURES]`, `directions` `[FEATURES, WIDTH]`; the loss is `[B]`.
    """
    error = (said - truth @ directions).square().sum(-1)
    contents = slice(FIRST_GLYPH, None)
    scale = torch.ones(FEATURES - FIRST_GLYPH, device=said.device)
    scale[FIRST_SHAPE - FIRST_GLYPH :] = THING_WEIGHT
    amounts, shown = (said @ directions.T)[..., contents] / scale, truth[..., contents] / scale
    sharp = functional.binary_cross_entropy_with_logits(
        SHARPNESS * (amounts - 0.5), shown.clamp(0, 1), reduction="none"
    ).sum(-1)
    with torch.no_grad():
        wrong = ((amounts > 0.5) != (shown > 0.5)) & ((shown > 0.75) | (shown < 0.25))
        clear = shown > 0.75
        scores = {}
        for name, first, end in PARTS:
            part = slice(first - FIRST_GLYPH, end - FIRST_GLYPH)
            scores[name] = (wrong & clear)[..., part].sum().item() / max(1, clear[..., part].sum().item())
        scores |= {"error": error.mean().item(), "wrong_patches": wrong.any(-1).float().mean().item()}
    return (error + sharp).mean(-1), scores


def align(
    model: LlavaForConditionalGeneration, run_path: Path, total: int, patches: int, peak: float, seed: int
) -> None:
    """Train the vision tower and the projector for `total` steps; the decoder is not used."""
    eyes = torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])
    run = Run(run_path, eyes, optimizers(eyes))
    directions = basis(WIDTH).to(device())
    for step in run.steps(total, peak):
        images = draw_batch(np.random.default_rng([seed, step]), patches)
        picture = pixels([image.draw() for image in images]).to(device())
        truth = torch.from_numpy(np.stack([features(image) for image in images])).to(device())
        weight = torch.tensor([1.0 if isinstance(image, Page) else SCENE_WEIGHT for image in images], device=device())
        with torch.autocast(device().type, torch.bfloat16):
            said = see(model, picture)
        loss, scores = loss_and_scores(said.float(), truth, directions)
        update(run.optimizers, (weight * loss).mean())
        run.notes |= {k: 0.98 * run.notes.get(k, v) + 0.02 * v for k, v in scores.items()}
        if step % 50 == 0:
            report("align", step, seconds=run.cpu_seconds, **run.notes)
