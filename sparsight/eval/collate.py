"""Examples collated to batches of conversations: images or passages, questions and right answers as token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from sparsight.eval.converse import Conversations
from sparsight.eval.passages import TextExample
from sparsight.models.inputs import apply_chat_template
from sparsight.reader.skills import Example

Message = dict[str, Any]


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a model without images has nothing but a tokenizer."""
    return getattr(processor, "tokenizer", processor)


def group_by_answer_length(tokenizer: Any, examples: Mapping[int, Example], size: int) -> list[list[int]]:
    """The examples' numbers in batches of at most ``size`` whose right answers have equal lengths in tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, example in examples.items():
        lengths = tuple(map(len, right_answers(tokenizer, example)))
        groups.setdefault(lengths, []).append(number)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def right_answers(tokenizer: Any, example: Example) -> list[list[int]]:
    """Token ids of the right answer of each turn; to questions about images, end of sequence included."""
    answers = [_ids(tokenizer, answer) for _, answer in example.turns]
    if isinstance(example, TextExample):
        return [answer[: example.tokens] for answer in answers]
    return [[*answer, tokenizer.eos_token_id] for answer in answers]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_conversations(
    tokenizer: Any, examples: Sequence[TextExample], device: Any, *, passage_as_vision: bool
) -> Conversations:
    """A batch of passages to go on with, on a device, as plain text without a chat template.

    Args:
        tokenizer: the model's tokenizer.
        examples: the batch.
        device: where the tensors are to be.
        passage_as_vision: mark the passages' tokens as vision tokens, in ``mm_token_type_ids``.
    """
    passages = [tokenizer(example.passage)["input_ids"] for example in examples]
    cues = [_ids(tokenizer, cue) for example in examples for cue, _ in example.turns]
    prompts = [[*passage, *cue] for passage, cue in zip(passages, cues, strict=True)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = _left_padded(prompts, pad, device)
    inputs = BatchFeature({"input_ids": ids, "attention_mask": mask})
    if passage_as_vision:
        types = [[1] * len(passage) + [0] * len(cue) for passage, cue in zip(passages, cues, strict=True)]
        inputs["mm_token_type_ids"] = _left_padded(types, 0, device)[0]
    answers = torch.tensor([right_answers(tokenizer, example)[0] for example in examples], device=device)
    return Conversations(inputs, [answers], [], forced=True)


def conversations(processor: Any, examples: Sequence[Example], device: Any, dtype: torch.dtype) -> Conversations:
    """A batch of questions about images on a device; images in ``dtype``.

    Raises:
        ValueError: the processor has no chat template, or one that rewrites earlier turns.
    """
    if not processor.chat_template:
        raise ValueError("The model's processor has no chat template, which conversations are written with.")
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    messages = [_messages(example) for example in examples]
    inputs = apply_chat_template(processor, [first[:1] for first in messages]).to(device, dtype)
    turns = range(len(examples[0].turns))
    right = [right_answers(tokenizer, example) for example in examples]
    answers = [torch.tensor([each[turn] for each in right], device=device) for turn in turns]
    questions = []
    for turn in turns[1:]:
        texts = [_text_between_answers(processor, conversation, turn) for conversation in messages]
        ids = [_ids(tokenizer, text) for text in texts]
        questions.append(_left_padded(ids, tokenizer.pad_token_id, device))
    return Conversations(inputs, answers, questions)


def _messages(example: Example) -> list[Message]:
    """An example as messages of user and assistant; the first one has the images."""
    images = [{"type": "image", "image": image} for image in example.pictures()]
    messages = []
    for question, answer in example.turns:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [*images, text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        images = []
    return messages


def _text_between_answers(processor: Any, messages: list[Message], turn: int) -> str:
    """The text that the template puts between the answers of the previous turn and this one, question included."""

    def rendered(count: int) -> str:
        return processor.apply_chat_template(messages[:count], add_generation_prompt=True, tokenize=False)

    answer = messages[2 * turn - 1]["content"][0]["text"]
    before, after = rendered(2 * turn - 1), rendered(2 * turn + 1)
    rest = after.removeprefix(before).lstrip()
    if not after.startswith(before) or not rest.startswith(answer):
        raise ValueError("The model's chat template rewrites earlier turns, so a conversation cannot be continued.")
    return rest.removeprefix(answer)


def _left_padded(sequences: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[B, q]``, padded on the left."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(each)) + each for each in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in sequences], device=device)
    return ids, mask
