"""Post-vision sparsity of every layer on held-out pages: `python -m training.sparsity`."""

import json
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.reader import model_path
from sparsight.reader.skills import Example, look_up
from training.prompt import batch_of

THRESHOLD = 0.01


def sparsity(attention: torch.Tensor, first_query: int) -> float:
    """Fraction of causally allowed weights below a hundredth of their query's largest, for queries from `first_query`.

    `attention` is `[H, T, T]`, after the softmax, causal.
    """
    weights = attention[:, first_query:].float()
    causal = torch.ones(attention.shape[-2:], dtype=torch.bool).tril()[first_query:]
    dropped = (weights < THRESHOLD * weights.amax(-1, keepdim=True)) & causal
    return (dropped.sum((1, 2)) / causal.sum()).mean().item()


@torch.inference_mode()
def layer_sparsities(model: Any, processor: Any, example: Example) -> list[float]:
    """Sparsity of each layer for the prompt of the example's first question."""
    question_only = Example(example.images, ((example.turns[0][0], ""),))
    ids = batch_of(processor.tokenizer, [question_only]).ids[:, :-1]
    pixels = processor.image_processor(example.pictures(), return_tensors="pt")["pixel_values"].to(model.dtype)
    made = model(input_ids=ids, pixel_values=pixels, output_attentions=True, use_cache=False)
    first_query = int((ids[0] == model.config.image_token_id).nonzero().max()) + 1
    return [sparsity(attention[0], first_query) for attention in made.attentions]


def main(count: Annotated[int, typer.Option(help="Pages.")] = 100, records: int = 32, seed: int = 11) -> None:
    """Print the mean sparsity of each layer as JSON."""
    processor = AutoProcessor.from_pretrained(model_path())
    model = AutoModelForImageTextToText.from_pretrained(model_path(), attn_implementation="eager").eval()
    examples = [look_up(np.random.default_rng([seed, i]), "heldout", records) for i in range(count)]
    table = np.array([layer_sparsities(model, processor, example) for example in examples])
    print(json.dumps({"pages": count, "records": records, "sparsity": [round(v, 3) for v in table.mean(0).tolist()]}))


if __name__ == "__main__":
    typer.run(main)
