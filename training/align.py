"""Stage: eyes. Vision tower and projector alone learn to say what each patch shows."""

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
"""Few patches of a scene show anything: they would not be heard among the pages' characters."""


PARTS = (
    ("glyphs", FIRST_GLYPH, FIRST_SHAPE),
    ("things", FIRST_SHAPE, FEATURES),
)
"""Kinds of features whose misses are counted apart: name, first and end."""


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as the image processor hands them over: `[B, 3, H, 336]` in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(rng: np.random.Generator, patches: int) -> list[Page | Scene]:
    """Pictures of one height, about `patches` patches in all: a quarter scenes, the others full of print or pages."""
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
    """Squared error of the vectors plus a sharper loss on each character's and thing's, for each picture.

    `said` is `[B, P, WIDTH]`, `truth` `[B, P, FEATURES]`, `directions` `[FEATURES, WIDTH]`; the loss is `[B]`.
    """
    error = (said - truth @ directions).square().sum(-1)
    seen = slice(FIRST_GLYPH, None)
    scale = torch.ones(FEATURES - FIRST_GLYPH, device=said.device)
    scale[FIRST_SHAPE - FIRST_GLYPH :] = THING_WEIGHT
    amounts, shown = (said @ directions.T)[..., seen] / scale, truth[..., seen] / scale
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
    """Train tower and projector for `total` steps; the decoder does not take part."""
    eyes = torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])
    run = Run(run_path, eyes, optimizers(eyes))
    directions = basis(WIDTH).to(device())
    for step in run.steps(total, peak):
        images = draw_batch(np.random.default_rng([seed, step]), patches)
        picture = pixels([image.draw() for image in images]).to(device())
        truth = torch.from_numpy(np.stack([features(image) for image in images])).to(device())
        heed = torch.tensor([1.0 if isinstance(image, Page) else SCENE_WEIGHT for image in images], device=device())
        with torch.autocast(device().type, torch.bfloat16):
            said = see(model, picture)
        loss, scores = loss_and_scores(said.float(), truth, directions)
        update(run.optimizers, (heed * loss).mean())
        run.notes |= {k: 0.98 * run.notes.get(k, v) + 0.02 * v for k, v in scores.items()}
        if step % 50 == 0:
            report("align", step, seconds=run.cpu_seconds, **run.notes)
