"""Train the shipped model: `python -m training.train`.

Stages: `read` (decoder, on target vectors), `align` (vision tower and projector), `adapt` (decoder, on their outputs),
`export` (checkpoint). Each resumes where it was stopped. `read` and `align` are independent: on two cores, run them in
parallel with one thread each.
"""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sparsight.reader import model_path
from training.adapt import adapt
from training.align import align
from training.export import export
from training.loop import device
from training.model import build, config
from training.prompt import token_ids
from training.read import init_embeddings, learn_to_read
from training.words import tokenizer

STAGES = ("read", "align", "adapt", "export")
SEED = 1


def fresh_model(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model, the same for every stage."""
    model = build(config(len(words), *token_ids(words, "<image>", "<pad>", "<s>", "</s>")), seed=0)
    init_embeddings(model, words)
    return torch.nn.Module.to(model, device())


def run_stage(stage: str, work: Path, scale: float) -> None:
    """Run or resume one stage; `scale` multiplies the batch size."""
    words = tokenizer()
    model = fresh_model(words)
    if stage == "read":
        learn_to_read(model, words, work / "read.pt", 3800, int(2400 * scale), 1e-3, SEED)
    elif stage == "align":
        align(model, work / "align.pt", 6500, int(2048 * scale), 2e-3, SEED)
    elif stage == "adapt":
        learned = torch.load(work / "read.pt", map_location="cpu", weights_only=True)["model"]
        torch.nn.ModuleList([model.model.language_model]).load_state_dict(learned)
        adapt(model, words, work / "adapt.pt", 7000, int(2400 * scale), 6e-4, SEED + 1, work / "align.pt")
    else:
        model.load_state_dict(torch.load(work / "adapt.pt", map_location="cpu", weights_only=True)["model"])
        export(model, words, model_path())


def main(
    stage: Annotated[str, typer.Option(help="One of the stages, or `all`.")] = "all",
    work: Annotated[Path, typer.Option(help="Folder for the stages' checkpoints.")] = Path("runs"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
    scale: Annotated[float, typer.Option(help="Batch size, as a multiple of the one tuned for two cores.")] = 1.0,
) -> None:
    """Run all stages in order, or one of them."""
    torch.set_num_threads(threads)
    for name in STAGES if stage == "all" else (stage,):
        run_stage(name, work, scale)


if __name__ == "__main__":
    typer.run(main)
