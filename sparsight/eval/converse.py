"""Conversations with a recipe's cache: the model's own answers, and the logits of the right answers."""

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
"""A generated answer may be longer than the right one by this many tokens and a quarter of its length."""


@dataclass(frozen=True)
class Conversations:
    """A batch of conversations of the same number of turns, whose right answers have the same lengths.

    Args:
        inputs: the first questions and their images, as the processor returned them, padded on the left.
        answers: the right answers of each turn, int64 ``[B, n]``, end of sequence included.
        questions: for each turn except the first the token ids between the previous answer and its own answer, int64
            ``[B, q]`` padded on the left, and their attention mask, int64 ``[B, q]``.
        forced: whether the model only follows the right answers, which may end anywhere, and writes none of its own.
    """

    inputs: BatchFeature
    answers: Sequence[Tensor]
    questions: Sequence[tuple[Tensor, Tensor]]
    forced: bool = False


@dataclass(frozen=True)
class Turn:
    """The result of one turn of a batch of conversations.

    Args:
        tokens: the model's answer by greedy decoding, ``[B, m]``, arbitrary after the end of a sequence. If answers are
            forced, the most likely token at each place of the right answer: all are right exactly if greedy decoding
            gives that answer.
        logits: for each token of the right answer, given the ones before it, float32 ``[B, n, V]``.
        held: the share of the full cache's bytes that the batch's cache held at the beginning of the turn.
    """

    tokens: Tensor
    logits: Tensor
    held: float


@torch.inference_mode()
def converse(
    snapshot: PrefillSnapshot, recipe: Recipe, conversations: Conversations, keep: str | None = None
) -> list[Turn]:
    """Hold the conversations with a recipe's cache; its decode rule applies to every token.

    With ``keep="host"`` a turn attends to the full cache, and the conversation so far is compressed again.

    Each turn is answered twice: by greedy decoding, unless answers are forced, and with the right answer forced, which
    the next turn continues.
    """
    model: Any = snapshot.model
    cache, logits = snapshot.cache(recipe, keep), snapshot.logits
    ids, mask = conversations.inputs["input_ids"], conversations.inputs["attention_mask"]
    turns = []
    for number, answer in enumerate(conversations.answers):
        if number > 0:
            question, valid = conversations.questions[number - 1]
            ids, mask = torch.cat([ids, question], dim=1), torch.cat([mask, valid], dim=1)
            logits = next_logits(model, cache, {"input_ids": ids, "attention_mask": mask})
        report = cache.report()
        length = answer.shape[1]
        first = logits.argmax(-1, keepdim=True)
        if not conversations.forced:
            free = decode(model, copy.deepcopy(cache), ids, mask, first, length + length // 4 + SPARE)
        along = decode(model, cache, ids, mask, answer[:, :1], length, [_Along(answer, ids.shape[1])])
        forced = torch.stack([logits, *along.logits], dim=1).float()
        tokens = forced.argmax(-1) if conversations.forced else free.sequences[:, ids.shape[1] :]
        turns.append(Turn(tokens, forced, report.bytes_held / report.full_bytes))
        # The end of sequence is not processed yet: the next turn starts with it, if the chat template has it.
        ids = torch.cat([ids, answer[:, :-1]], dim=1)
        mask = torch.cat([mask, torch.ones_like(answer[:, :-1])], dim=1)
    return turns


class _Along(LogitsProcessor):
    """Forces an answer ``[B, n]`` after ``start`` tokens."""

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
    """The output of ``generate`` for at most ``limit`` tokens after ``ids`` ``[B, S]``, of which ``first`` is given.

    The cache has processed ``ids`` but not ``first``; the output has logits for the tokens after it.
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
