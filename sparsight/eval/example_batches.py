"""Examples as batches of conversations: pictures, questions and right answers in a model's own tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsight.eval.converse import Conversations
from sparsight.models.inputs import apply_chat_template
from sparsight.reader.skills import Example

Message = dict[str, Any]


def batches(tokenizer: Any, examples: Mapping[int, Example], size: int) -> list[list[int]]:
    """The examples' numbers in batches of at most ``size`` whose right answers have the same numbers of tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, example in examples.items():
        lengths = tuple(len(answer_tokens(tokenizer, answer)) for _, answer in example.turns)
        groups.setdefault(lengths, []).append(number)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """An answer as a model would say it, an end of sequence last."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def conversations(processor: Any, examples: Sequence[Example], device: Any, dtype: torch.dtype) -> Conversations:
    """A batch of examples for a model on a device.

    Raises:
        ValueError: the processor has no chat template, or one that rewrites what came before.
    """
    if not processor.chat_template:
        raise ValueError("The model's processor has no chat template, which conversations are written with.")
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    messages = [_messages(example) for example in examples]
    inputs = apply_chat_template(processor, [first[:1] for first in messages]).to(device, dtype)
    turns = range(len(examples[0].turns))
    answers = [
        torch.tensor([answer_tokens(tokenizer, example.turns[turn][1]) for example in examples], device=device)
        for turn in turns
    ]
    questions = []
    for turn in turns[1:]:
        texts = [_between(processor, given, turn) for given in messages]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        questions.append(_padded(ids, tokenizer.pad_token_id, device))
    return Conversations(inputs, answers, questions)


def _messages(example: Example) -> list[Message]:
    """An example as user and assistant take turns; the pictures come first."""
    pictures = [{"type": "image", "image": picture} for picture in example.pictures()]
    messages = []
    for question, answer in example.turns:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [*pictures, text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        pictures = []
    return messages


def _between(processor: Any, messages: list[Message], turn: int) -> str:
    """What the template puts between a turn's answer and that of the turn before it, the question among it."""

    def written(count: int) -> str:
        return processor.apply_chat_template(messages[:count], add_generation_prompt=True, tokenize=False)

    answer = messages[2 * turn - 1]["content"][0]["text"]
    before, after = written(2 * turn - 1), written(2 * turn + 1)
    rest = after.removeprefix(before).lstrip()
    if not after.startswith(before) or not rest.startswith(answer):
        raise ValueError("The model's chat template rewrites earlier turns, so a conversation cannot be continued.")
    return rest.removeprefix(answer)


def _padded(rows: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, q]`` padded on the left, and which are valid."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    valid = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, valid
