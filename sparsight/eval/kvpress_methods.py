"""kvpress's methods on the same weights, prompts and budgets, measured like Sparsight's own."""

import json
from dataclasses import dataclass, field

import torch

from sparsight.bench.kvpress import CannotRun, Kvpress
from sparsight.eval.converse import Conversations, Turn


@dataclass(frozen=True)
class KvpressMethod:
    """A method of kvpress in place of a recipe.

    Args:
        press: one of :data:`sparsight.bench.kvpress_worker.PRESSES`.
        budget: fraction of the prompt's entries that are kept.
        process: what runs it.
    """

    press: str
    budget: float
    process: Kvpress = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"kvpress {self.press}"

    def to_json(self) -> str:
        """What identifies its results."""
        return json.dumps({"name": self.name, "budget": self.budget})

    def follow(self, conversations: Conversations) -> list[Turn]:
        """Process prompts and their right answers one by one, since kvpress has no padding.

        Raises:
            ValueError: kvpress refuses one.
        """
        ids, mask = conversations.inputs["input_ids"], conversations.inputs["attention_mask"].bool()
        (answers,) = conversations.answers
        logits, held = [], []
        for prompt, valid, answer in zip(ids, mask, answers, strict=True):
            try:
                got, share = self.process.follow(self.press, self.budget, prompt[valid].tolist(), answer.tolist())
            except CannotRun as error:
                raise ValueError(f"{error}.") from error
            logits.append(got)
            held.append(share)
        forced = torch.stack(logits).to(ids.device)
        return [Turn(forced.argmax(-1), forced, sum(held) / len(held))]
