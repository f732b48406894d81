"""Teach SmolLM2 to answer questions about pages: first as exact vectors, then as the vision tower sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sparsight.reader.page import PATCH
from sparsight.reader.skills import Example, compare, look_up, read_out
from training.attention import NAME as PLAIN
from training.loop import Run, device, report, update
from training.smollm.low_rank import add_low_rank
from training.smollm.prompts import IMAGE, answer_tokens, batch_of
from training.smollm.vectors import initial_vectors
from training.targets import FIRST_GLYPH, GRID, features

Look = Callable[[list[Example]], torch.Tensor]
"""Gives the features of the patches of the examples' images, `[N, FEATURES]`."""

LEVELS = ((2, 2), (3, 4), (6, 8), (12, 16), (24, 24), (24, 64))
"""Rows of patches and most records of a page, by level; the level rises when look-up is mastered."""

MASTERED = 0.92
"""Fraction of right answer tokens at which the level rises."""

FULL = 4
"""First level with pages of full height, from which on all skills are trained."""

THIN_SHARE, THIN_UNTIL = 0.75, 0.8
"""Share of the steps that leave out most blank patches, about half of all tokens, and when these steps end."""

SKILLS = ("look-up", "reading", "two pages")
WEIGHTS = (0.35, 0.45, 0.2)

JUDGED: dict[str, Callable[[np.random.Generator], Example]] = {
    "look-up 4": lambda rng: look_up(rng, "heldout", 4, 4),
    "look-up 8": lambda rng: look_up(rng, "heldout", 8, 4),
    "look-up 24": lambda rng: look_up(rng, "heldout", 24, 4),
    "reading 8": lambda rng: read_out(rng, "heldout", 8),
    "two pages 8": lambda rng: compare(rng, "heldout", 8, 4, pages=1.0),
}
"""How held-out examples are made, of full height; the right earlier answers are in the prompt of a later question."""


@dataclass(frozen=True)
class Student:
    """The language model, frozen, with what is trained: the features' vectors and the low-rank updates."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    trained: torch.nn.ParameterList

    def embed(self, ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, width]` of token ids, with the vectors of the patches' features `shown` at `IMAGE`."""
        embedded = functional.embedding(ids.clamp(0), self.model.get_input_embeddings().weight)
        vectors = shown @ self.trained[0]
        return embedded.masked_scatter((ids == IMAGE)[..., None], vectors.to(embedded.dtype))

    def answers(
        self, examples: list[Example], shown: torch.Tensor, left_out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[N, vocabulary]` where the answers' tokens are predicted, and these tokens `[N]`.

        The other tokens keep their positions if some patches are `left_out`, a mask `[number of patches]`.
        """
        batch = batch_of(self.tokenizer, examples)
        ids, labels = batch.ids.to(device()), batch.labels.to(device())
        embedded, positions = self.embed(ids, shown), torch.arange(ids.shape[1], device=device())[None]
        if left_out is not None:
            dropped = torch.zeros_like(ids, dtype=torch.bool).masked_scatter(ids == IMAGE, left_out)
            # What is left out comes last, as padding.
            order = dropped.int().argsort(dim=1, stable=True)[:, : int((~dropped).sum(1).max())]
            embedded = embedded.take_along_dim(order[..., None], 1)
            labels, positions = labels.take_along_dim(order, 1), order
        hidden = self.model.model(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        at = labels >= 0
        return self.model.lm_head(hidden[at]).float(), labels[at]


def student(folder: Path, tokenizer: PreTrainedTokenizerFast, rank: int, seed: int) -> Student:
    """An untrained student on the checkpoint in `folder`, in bf16."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.set_attn_implementation(PLAIN)
    torch.manual_seed(seed)
    factors = add_low_rank(model.model, rank)
    model.requires_grad_(False)
    vectors = torch.nn.Parameter(initial_vectors(model.get_input_embeddings().weight, tokenizer))
    trained = torch.nn.ParameterList([vectors, *(factor.requires_grad_(True) for factor in factors)])
    return Student(model.to(device()), tokenizer, trained.to(device()))


def exact_features(examples: list[Example]) -> torch.Tensor:
    """Features of the patches from the pages' descriptions, `[N, FEATURES]`."""
    shown = np.concatenate([features(image) for example in examples for image in example.images])
    return torch.from_numpy(shown).to(device())


def draw_examples(rng: np.random.Generator, skill: str, level: int, tokens: int) -> list[Example]:
    """Examples of one skill at a level of the curriculum or below, about `tokens` tokens in total."""
    rows, most = LEVELS[level if rng.random() < 0.8 else rng.integers(level + 1)]
    height = rows * PATCH

    def fill(length: int) -> range:
        return range(max(1, tokens // length))

    if skill == "look-up":
        records = round(most ** rng.random()) if rng.random() < 0.5 else int(rng.integers(max(1, most // 4), most + 1))
        questions = min(16, 2 * records)
        return [look_up(rng, "train", records, questions, height) for _ in fill(rows * GRID + questions * 22)]
    if skill == "reading":
        # One more line for END, and one for the margins.
        records = int(rng.integers(1, min(most, 20) + 1))
        height = max(height, (records + 2) * PATCH)
        return [read_out(rng, "train", records, height) for _ in fill(height // PATCH * GRID + records * 10)]
    # Two pages of full height would be twice as many tokens as one.
    rows = rows if rng.random() < 0.3 else min(rows, 8)
    records = int(rng.integers(1, min(most, 2 * rows, 24) + 1))
    return [compare(rng, "train", records, 8, rows * PATCH, pages=1.0) for _ in fill(rows * 2 * GRID + 8 * 27)]


def blank(rng: np.random.Generator, shown: torch.Tensor) -> torch.Tensor:
    """A mask `[number of patches]` of most of the blank patches, at random."""
    chosen = torch.from_numpy(rng.random(len(shown)) < rng.uniform(0.7, 1)).to(shown.device)
    return (shown[:, FIRST_GLYPH:].amax(1) < 0.15) & chosen


@torch.inference_mode()
def judge(pupil: Student, look: Look, count: int, seed: int = 7) -> dict[str, float]:
    """Fraction of answers without a wrong token on `count` held-out examples of each kind in `JUDGED`."""
    scores = {}
    for number, (kind, make) in enumerate(JUDGED.items()):
        right = []
        for index in range(count):
            example = make(np.random.default_rng([seed, number, index]))
            logits, wanted = pupil.answers([example], look([example]))
            sizes = [len(answer_tokens(pupil.tokenizer, answer)) for _, answer in example.turns]
            right += [bool(hits.all()) for hits in (logits.argmax(-1) == wanted).split(sizes)]
        scores[f"heldout {kind}"] = sum(right) / len(right)
    return scores


def learn_to_read(
    pupil: Student,
    path: Path,
    total: int,
    tokens: int,
    peak: float,
    seed: int,
    look: Look = exact_features,
    judge_every: int = 200,
    pages: int = 10,
) -> None:
    """Train for `total` steps of about `tokens` tokens each; resumes from the file `path`.

    Pages are described exactly at first, those of levels with pages of full height by `look`.
    """
    optimizer = torch.optim.AdamW(pupil.trained, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    run = Run(path, pupil.trained, [optimizer])
    for step in run.steps(total, peak):
        rng = np.random.default_rng([seed, step])
        level = int(run.notes.get("level", 0))
        skill = SKILLS[rng.choice(len(SKILLS), p=WEIGHTS)] if level >= FULL else "look-up"
        thin = step < THIN_UNTIL * total and rng.random() < THIN_SHARE
        examples = draw_examples(rng, skill, level, int(1.9 * tokens) if thin else tokens)
        shown = (look if level >= FULL else exact_features)(examples)
        logits, wanted = pupil.answers(examples, shown, blank(rng, shown) if thin else None)
        loss = functional.cross_entropy(logits, wanted)
        update(run.optimizers, loss)
        right = (logits.argmax(-1) == wanted).float().mean().item()
        for name, value in (("loss", loss.item()), (skill, right)):
            run.notes[name] = 0.9 * run.notes.get(name, value) + 0.1 * value
        run.notes["questions"] = run.notes.get("questions", 0) + sum(len(example.turns) for example in examples)
        if run.notes["look-up"] > MASTERED and level + 1 < len(LEVELS):
            run.notes |= {"level": level + 1, "look-up": 0.6}
        if step % judge_every == judge_every - 1:
            run.notes |= judge(pupil, look, pages)
        if step % 10 == 0:
            report("read", step, seconds=run.cpu_seconds, wall=run.seconds, **run.notes)
