"""Conversations with a recipe's cache: the model's own answers, and the logits of the right answers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor
from transformers.feature_extraction_utils import BatchFeature

from sparsight.cache import CompressedCache
from sparsight.cache.layer import CompressedLayer
from sparsight.compression.recipe import Recipe
from sparsight.engine.engine import Engine
from sparsight.engine.positions import next_positions
from sparsight.engine.prefilled import PrefilledPrompt, next_logits, split
from sparsight.engine.request import RequestError
from sparsight.engine.sampling import SamplingParams
from sparsight.eval.prefill_snapshot import PrefillSnapshot

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
    snapshot: PrefillSnapshot,
    recipe: Recipe,
    conversations: Conversations,
    keep: str | None = None,
    host_dtype: str | None = None,
) -> list[Turn]:
    """Hold the conversations with a recipe's cache; its decode rule applies to every token.

    With ``keep="host"`` a turn attends to the full cache, stored as ``host_dtype``, and the conversation so far is
    compressed again.

    Each turn is answered twice: with the right answer forced, which the next turn continues, and by greedy decoding,
    unless answers are forced.

    Raises:
        ValueError: an answer cannot be generated.
    """
    model: Any = snapshot.model
    cache, logits = snapshot.cache(recipe, keep, host_dtype), snapshot.logits
    ids, mask = conversations.inputs["input_ids"], conversations.inputs["attention_mask"]
    first, length = next_positions(model, conversations.inputs), ids.shape[1]
    turns = []
    for number, answer in enumerate(conversations.answers):
        if number > 0:
            question, valid = conversations.questions[number - 1]
            ids, mask = torch.cat([ids, question], dim=1), torch.cat([mask, valid], dim=1)
            logits = next_logits(model, cache, {"input_ids": ids, "attention_mask": mask})
        report, inputs = cache.report(), {"input_ids": ids, "attention_mask": mask}
        before = None if conversations.forced else copy.deepcopy(cache)
        forced = _forced_logits(model, cache, inputs, logits, answer)
        tokens = forced.argmax(-1)
        if before is not None:
            prompts = split(before, inputs, first + mask[:, length:].sum(-1), logits)
            tokens = _answers(model, prompts, inputs, answer, (tokens == answer).all(-1))
        turns.append(Turn(tokens, forced, report.bytes_held / report.full_bytes))
        # The end of sequence is not processed yet: the next turn starts with it, if the chat template has it.
        ids = torch.cat([ids, answer[:, :-1]], dim=1)
        mask = torch.cat([mask, torch.ones_like(answer[:, :-1])], dim=1)
    return turns


def _answers(
    model: Any, prompts: Sequence[PrefilledPrompt], inputs: Mapping[str, Tensor], answer: Tensor, right: Tensor
) -> Tensor:
    """Greedy answers ``[B, m]``, arbitrary after the end of a sequence.

    Args:
        model: the model.
        prompts: the conversations so far.
        inputs: the same as padded token ids and attention mask.
        answer: the right answers, ``[B, n]``.
        right: whether greedy decoding begins with the right answer, bool ``[B]``.
    """
    config, longest = model.generation_config, answer.shape[1] + answer.shape[1] // 4 + SPARE
    cache = prompts[0].cache
    if not all(isinstance(layer, CompressedLayer) for layer in cache.layers):
        # The other layers hold the padding of the batch, which sequences of the engine do not have.
        most_likely = torch.cat([prompt.logits for prompt in prompts]).argmax(-1, keepdim=True)
        return _generate(model, cache, inputs, most_likely, longest).sequences[:, inputs["input_ids"].shape[1] :]
    params = SamplingParams.from_generation_config(config, temperature=0.0, max_new_tokens=longest)
    # What is right to its end need not be generated, unless a penalty may change it.
    ends = answer.new_tensor(sorted(params.end_token_ids(config)))
    known = right & torch.isin(answer[:, -1], ends) & (params.repetition_penalty == 1)
    tokens = list(answer)
    with Engine(model, None) as engine:
        handles = {index: engine.resume(prompts[index], params) for index in (~known).nonzero()[:, 0].tolist()}
        for index, handle in handles.items():
            try:
                tokens[index] = answer.new_tensor(handle.wait()[0].token_ids)
            except RequestError as error:
                raise ValueError(str(error)) from error
    return pad_sequence(tokens, batch_first=True)


def _forced_logits(
    model: Any, cache: CompressedCache, inputs: Mapping[str, Tensor], logits: Tensor, answer: Tensor
) -> Tensor:
    """Logits of each token of an answer ``[B, n]``, given the ones before it, float32 ``[B, n, V]``."""
    # The engine neither forces tokens nor returns logits.
    forced = _Forced(answer, inputs["input_ids"].shape[1])
    output = _generate(model, cache, inputs, answer[:, :1], answer.shape[1], [forced])
    return torch.stack([logits, *output.logits], dim=1).float()


class _Forced(LogitsProcessor):
    """Forces an answer ``[B, n]`` after ``start`` tokens."""

    def __init__(self, answer: Tensor, start: int) -> None:
        self.answer, self.start = answer, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = self.answer[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _generate(
    model: Any,
    cache: CompressedCache,
    inputs: Mapping[str, Tensor],
    first: Tensor,
    limit: int,
    processors: Sequence[LogitsProcessor] = (),
) -> Any:
    """The output of ``generate`` for at most ``limit`` tokens after ``inputs``, of which ``first`` is given.

    The cache has processed ``inputs`` but not ``first``; the output has logits for the tokens after it.
    """
    return model.generate(
        input_ids=torch.cat([inputs["input_ids"], first], dim=1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(first)], dim=1),
        past_key_values=cache,
        max_new_tokens=limit - 1,
        do_sample=False,
        num_beams=1,
        logits_processor=list(processors),
        output_logits=True,
        return_dict_in_generate=True,
    )
