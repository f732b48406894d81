"""The shipped reader's vision tower as the eyes of a larger model.

Its projected features are sums of the directions in `training.targets`, one for each feature of a patch, so that the
features of an image follow from them by a linear map. Nothing has to be trained.
"""

from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from sparsight.reader import model_path
from sparsight.reader.skills import Example
from training.align import pixels
from training.loop import device
from training.model import WIDTH, see
from training.targets import FEATURES, FIRST_GLYPH, basis

ABSENT, PRESENT = -0.048, 1.029
"""Mean amounts that the tower gives to characters absent from and present in a patch; measured on 80 pages."""


def linear_map() -> tuple[torch.Tensor, torch.Tensor]:
    """The map from projected features to amounts of each feature: weight `[FEATURES, WIDTH]` and bias `[FEATURES]`."""
    contents = torch.arange(FEATURES) >= FIRST_GLYPH
    scale = torch.where(contents, 1 / (PRESENT - ABSENT), 1.0)
    return scale[:, None] * basis(WIDTH), torch.where(contents, -ABSENT * scale, 0.0)


class Eyes:
    """Features of images as the shipped reader's vision tower sees them."""

    def __init__(self) -> None:
        reader: Any = AutoModelForImageTextToText.from_pretrained(model_path(), dtype=torch.float32)
        self.reader = reader.requires_grad_(False).to(device())
        self.weight, self.bias = (part.to(device()) for part in linear_map())

    @torch.no_grad()
    def features(self, examples: list[Example]) -> torch.Tensor:
        """Amounts of each feature in the patches of the examples' images, `[N, FEATURES]`."""
        projected = [see(self.reader, pixels([picture]).to(device()))[0] for e in examples for picture in e.pictures()]
        return torch.cat(projected) @ self.weight.T + self.bias
