"""Conversations through a cache: what the model answers freely, and how probable it finds the right answers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.feature_extraction_utils import BatchFeature

from sparsight.cache import CompressedCache
from sparsight.compression.recipe import Recipe
from sparsight.eval.prefill_snapshot import PrefillSnapshot, next_logits

SPARE = 4
"""Tokens by which a free answer may be longer than the right one, beside a quarter of its length."""


@dataclass(frozen=True)
class Conversations:
    """A batch of conversations of the same number of turns, whose right answers have the same lengths.

    Args:
        inputs: the first questions and their pictures, as the processor returned them, padded on the left.
        answers: for each turn the right answers, int64 ``[B, n]``, an end of sequence last.
        questions: for each turn but the first what stands between the end of the answer before it and its own answer,
            int64 ``[B, q]`` padded on the left, and which of it is valid, int64 ``[B, q]``.
    """

    inputs: BatchFeature
    answers: Sequence[Tensor]
    questions: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Turn:
    """What became of one turn of a batch of conversations.

    Args:
        tokens: what the model answered by greedy search, ``[B, m]``, anything after the end of a sequence.
        logits: of each token of the right answer, given those before it, float32 ``[B, n, V]``.
    """

    tokens: Tensor
    logits: Tensor


@torch.inference_mode()
def converse(recorded: PrefillSnapshot, recipe: Recipe, conversations: Conversations) -> list[Turn]:
    """Hold the conversations through a recipe's cache, every token through its decode rule.

    Each turn is answered twice, freely and along the right answer, which is also what the next turn follows.
    """
    model: Any = recorded.model
    cache, logits = recorded.cache(recipe), recorded.logits
    ids, mask = conversations.inputs["input_ids"], conversations.inputs["attention_mask"]
    turns = []
    for number, answer in enumerate(conversations.answers):
        if number > 0:
            question, valid = conversations.questions[number - 1]
            ids, mask = torch.cat([ids, question], dim=1), torch.cat([mask, valid], dim=1)
            logits = next_logits(model, cache, {"input_ids": ids, "attention_mask": mask})
        length = answer.shape[1]
        first = logits.argmax(-1, keepdim=True)
        free = decode(model, copy.deepcopy(cache), ids, mask, first, length + length // 4 + SPARE)
        along = decode(model, cache, ids, mask, answer[:, :1], length, [_Along(answer, ids.shape[1])])
        turns.append(Turn(free.sequences[:, ids.shape[1] :], torch.stack([logits, *along.logits], dim=1).float()))
        # The end of sequence has not been seen: what comes next brings it, if the model's template has it.
        ids = torch.cat([ids, answer[:, :-1]], dim=1)
        mask = torch.cat([mask, torch.ones_like(answer[:, :-1])], dim=1)
    return turns


class _Along(LogitsProcessor):
    """Makes the model say an answer ``[B, n]`` after ``start`` tokens."""

    def __init__(self, answer: Tensor, start: int) -> None:
        self.answer, self.start = answer, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = self.answer[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def decode(
    model: Any,
    cache: CompressedCache,
    ids: Tensor,
    mask: Tensor,
    first: Tensor,
    limit: int,
    processors: Sequence[LogitsProcessor] = (),
) -> Any:
    """What ``generate`` returns for at most ``limit`` tokens after ``ids`` ``[B, S]``, beginning with ``first``.

    The cache has seen ``ids`` and not ``first``; there are logits for the tokens after it.
    """
    return model.generate(
        input_ids=torch.cat([ids, first], dim=1),
        attention_mask=torch.cat([mask, torch.ones_like(first)], dim=1),
        past_key_values=cache,
        max_new_tokens=limit - 1,
        do_sample=False,
        num_beams=1,
        logits_processor=list(processors),
        output_logits=True,
        return_dict_in_generate=True,
    )
