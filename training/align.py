"""Stage: eyes. Vision tower and projector alone learn to say what each patch shows."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from sparsight.zoo.page import Page, random_page, random_print
from sparsight.zoo.scene import Scene, random_scene
from training.loop import Run, device, report, update
from training.model import WIDTH, see
from training.targets import FIRST_GLYPH, FIRST_SHAPE, basis, features

SHARPNESS = 8.0
SCENE_WEIGHT = 6.0
"""Few patches of a scene show anything: they would not be heard among the pages' characters."""

PLAIN_UNTIL = 2000
"""Steps over which plain print gives way to every style."""


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as the image processor hands them over: `[B, 3, H, 336]` in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(rng: np.random.Generator, patches: int, plain: float) -> list[Page | Scene]:
    """Pictures of one kind and height, about `patches` patches in all; `plain` is the share of plain print."""
    if rng.random() < plain:
        return [random_print(rng, 56, plain=True) for _ in range(max(1, patches // 96))]
    kind = rng.random()
    if kind < 0.25:
        rows = int(rng.choice([8, 24], p=[0.7, 0.3]))
        return [random_scene(rng, height=rows * 14) for _ in range(max(1, patches // (rows * 24)))]
    rows = int(rng.choice([4, 8, 24], p=[0.7, 0.15, 0.15]))
    count = max(1, patches // (rows * 24))
    if kind < 0.65:
        return [random_print(rng, rows * 14) for _ in range(count)]
    most = {4: 12, 8: 24, 24: 64}[rows]
    return [random_page(rng, int(rng.integers(1, most + 1)), height=rows * 14) for _ in range(count)]


def loss_and_scores(
    said: torch.Tensor, truth: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error of the vectors plus a sharper loss on each character's.

    `said` is `[B, P, WIDTH]`, `truth` `[B, P, FEATURES]`, `directions` `[FEATURES, WIDTH]`.
    """
    error = (said - truth @ directions).square().sum(-1).mean()
    amounts = said @ directions.T
    seen = slice(FIRST_GLYPH, FIRST_SHAPE)
    logits = SHARPNESS * (amounts[..., seen] - 0.5)
    sharp = functional.binary_cross_entropy_with_logits(logits, truth[..., seen].clamp(0, 1), reduction="none")
    with torch.no_grad():
        hit = ((amounts > 0.5) == (truth > 0.5))[..., FIRST_GLYPH:FIRST_SHAPE]
        sure = ((truth > 0.75) | (truth < 0.25))[..., FIRST_GLYPH:FIRST_SHAPE]
        clear = truth[..., FIRST_GLYPH:FIRST_SHAPE] > 0.75
        scores = {
            "error": error.item(),
            "missed": 1 - (hit & clear).sum().item() / max(1, clear.sum().item()),
            "wrong_patches": (~hit & sure).any(-1).float().mean().item(),
            "things": share_off(amounts[..., FIRST_SHAPE:], truth[..., FIRST_SHAPE:]),
        }
    return error + sharp.sum(-1).mean(), scores


def share_off(amounts: torch.Tensor, truth: torch.Tensor) -> float:
    """Error of the amounts where there is something to see, relative to what there is."""
    there = truth > 0
    return (amounts - truth)[there].abs().sum().item() / max(1e-6, truth[there].sum().item())


def align(
    model: LlavaForConditionalGeneration, run_path: Path, total: int, patches: int, peak: float, seed: int
) -> None:
    """Train tower and projector for `total` steps; the decoder does not take part."""
    eyes = torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])
    optimizer = torch.optim.AdamW(eyes.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    run = Run(run_path, eyes, optimizer)
    directions = basis(WIDTH).to(device())
    running: dict[str, float] = {}
    for step in run.steps(total, peak):
        images = draw_batch(np.random.default_rng([seed, step]), patches, max(0.0, 0.9 * (1 - step / PLAIN_UNTIL)))
        picture = pixels([image.draw() for image in images]).to(device())
        truth = torch.from_numpy(np.stack([features(image) for image in images])).to(device())
        with torch.autocast(device().type, torch.bfloat16):
            said = see(model, picture)
        loss, scores = loss_and_scores(said.float(), truth, directions)
        update(optimizer, loss if isinstance(images[0], Page) else SCENE_WEIGHT * loss)
        if isinstance(images[0], Page):
            scores.pop("things")
        else:
            scores = {"things": scores["things"]}
        running |= {k: 0.98 * running.get(k, v) + 0.02 * v for k, v in scores.items()}
        if step % 50 == 0:
            report("align", step, seconds=run.cpu_seconds, **running)
