"""Write what was trained as the file that ships with the package: `python -m training.smollm.export`."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from sparsight.models.reader_30 import LINEARS, weights_path
from sparsight.reader import model_path
from training.smollm.eyes import linear_map


@torch.no_grad()
def projector(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reader's projector, followed by the linear map from its features to the language model's vectors."""
    reader: Any = AutoModelForImageTextToText.from_pretrained(model_path(), dtype=torch.float32)
    eyes = reader.model.multi_modal_projector
    weight, bias = linear_map()
    to_vectors, (inner, width) = vectors.T @ weight, (len(eyes.linear_1.bias), vectors.shape[1])
    first, second = torch.zeros(width, eyes.linear_1.in_features), torch.zeros(width, width)
    # The language model is wider than the reader: the other inner units stay zero, and GELU(0) = 0.
    first[:inner] = eyes.linear_1.weight
    second[:, :inner] = to_vectors @ eyes.linear_2.weight
    return {
        "projector.linear_1.weight": first,
        "projector.linear_1.bias": torch.cat([eyes.linear_1.bias, torch.zeros(width - inner)]),
        "projector.linear_2.weight": second,
        "projector.linear_2.bias": to_vectors @ eyes.linear_2.bias + bias @ vectors,
    }


def weights(trained: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was trained, by the names of `sparsight.models.reader_30.assemble`: the vectors, then a layer's factors."""
    vectors, *factors = trained
    names = [
        f"layers.{layer}.{linear}.{factor}"
        for layer in range(len(factors) // (2 * len(LINEARS)))
        for linear in LINEARS
        for factor in ("down", "up")
    ]
    return projector(vectors) | dict(zip(names, factors, strict=True))


def main(
    work: Annotated[Path, typer.Option(help="Folder with the training's checkpoint.")] = Path("runs/smollm"),
    file: Annotated[Path | None, typer.Option(help="File to write; by default the one that ships.")] = None,
) -> None:
    """Write the file, in bf16."""
    saved = torch.load(work / "read.pt", map_location="cpu", weights_only=True)["model"]
    made = weights([saved[str(index)] for index in range(len(saved))])
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in made.items()}, file or weights_path())


if __name__ == "__main__":
    typer.run(main)
