"""Low-rank updates of frozen linear layers (LoRA, Hu et al., 2021, arXiv 2106.09685)."""

from typing import Any

import torch
from torch import nn

from sparsight.models.reader_30 import LINEARS


class LowRank(nn.Module):
    """A frozen linear layer plus `up @ down`, which is zero at first; the factors are float32, the products bf16."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's outputs, `[..., out_features]`."""
        flat = inputs.flatten(0, -2)
        inner = flat @ self.down.to(inputs.dtype).T
        outputs = torch.addmm(self.linear(flat), inner, self.up.to(inputs.dtype).T)
        return outputs.view(*inputs.shape[:-1], -1)


def add_low_rank(language_model: Any, rank: int) -> list[nn.Parameter]:
    """Freeze a Llama model and give each of its linear layers a low-rank update; returns the factors."""
    language_model.requires_grad_(False)
    factors = []
    for layer in language_model.layers:
        for name in LINEARS:
            updated = LowRank(layer.get_submodule(name), rank)
            layer.set_submodule(name, updated)
            factors += [updated.down, updated.up]
    return factors
