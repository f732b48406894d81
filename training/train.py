"""Train the shipped model: `python -m training.train`.

Stages: `read` (decoder, packed pages), `align` (eyes), `adapt` and `adapt-b` (decoder, through those eyes, on different
examples), `average` (of these two), `export` (checkpoint). Each resumes where it was stopped. Side by side, a thread
each, two cores are used best: `align` beside `read`, then `adapt` beside `adapt-b`.
"""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sparsight.zoo import model_path
from training.adapt import adapt
from training.align import align
from training.export import export
from training.loop import device
from training.model import build, config
from training.prompt import token_ids
from training.read import learn_to_read, ready_embeddings
from training.words import tokenizer

ADAPTERS = ("adapt", "adapt-b")
STAGES = ("read", "align", *ADAPTERS, "average", "export")
SEED = 1


def fresh_model(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model before training; the same for every stage."""
    model = build(config(len(words), *token_ids(words, "<image>", "<pad>", "<s>", "</s>")), seed=0)
    ready_embeddings(model, words)
    return torch.nn.Module.to(model, device())


def load_parts(model: LlavaForConditionalGeneration, work: Path) -> None:
    """Put the results of the stages `read` and `align` into the model."""
    language = torch.load(work / "read.pt", map_location="cpu", weights_only=True)["model"]
    eyes = torch.load(work / "align.pt", map_location="cpu", weights_only=True)["model"]
    torch.nn.ModuleList([model.model.language_model]).load_state_dict(language)
    torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector]).load_state_dict(eyes)


def run_stage(stage: str, work: Path, scale: float) -> None:
    """Run or resume one stage; `scale` multiplies the batch."""
    words = tokenizer()
    model = fresh_model(words)
    if stage == "read":
        learn_to_read(model, words, work / "read.pt", 3500, int(2400 * scale), 1e-3, SEED)
    elif stage == "align":
        align(model, work / "align.pt", 9500, int(1536 * scale), 8e-4, SEED)
    elif stage in ADAPTERS:
        load_parts(model, work)
        path, seed = work / f"{stage}.pt", SEED + 1 + ADAPTERS.index(stage)
        adapt(model, words, path, 1950, int(2400 * scale), 2.5e-4, seed, work / "align.pt")
    elif stage == "average":
        torch.save({"model": average([work / f"{name}.pt" for name in ADAPTERS])}, work / "average.pt")
    else:
        load_model(model, work / "average.pt")
        export(model, words, model_path())


def average(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Weights halfway between those of runs that began at the same place: what each learned by chance cancels."""
    states = [torch.load(path, map_location="cpu", weights_only=True)["model"] for path in paths]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def load_model(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Put the result of a stage that trains the whole model into it."""
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])


def main(
    stage: Annotated[str, typer.Option(help="One of the stages, or `all`.")] = "all",
    work: Annotated[Path, typer.Option(help="Where unfinished stages are kept.")] = Path("runs"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
    scale: Annotated[float, typer.Option(help="Batch size, as a multiple of the one tuned for two cores.")] = 1.0,
) -> None:
    """Train all stages in turn, or one."""
    torch.set_num_threads(threads)
    for name in STAGES if stage == "all" else (stage,):
        run_stage(name, work, scale)


if __name__ == "__main__":
    typer.run(main)
