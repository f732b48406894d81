"""Examples collated to batches of conversations: images, questions and right answers as a model's token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsight.eval.converse import Conversations
from sparsight.models.inputs import apply_chat_template
from sparsight.reader.skills import Example

Message = dict[str, Any]


def group_by_answer_length(tokenizer: Any, examples: Mapping[int, Example], size: int) -> list[list[int]]:
    """The examples' numbers in batches of at most ``size`` whose right answers have equal lengths in tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, example in examples.items():
        lengths = tuple(len(answer_tokens(tokenizer, answer)) for _, answer in example.turns)
        groups.setdefault(lengths, []).append(number)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer, end of sequence included."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def conversations(processor: Any, examples: Sequence[Example], device: Any, dtype: torch.dtype) -> Conversations:
    """A batch of examples on a device; images in ``dtype``.

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
    answers = [
        torch.tensor([answer_tokens(tokenizer, example.turns[turn][1]) for example in examples], device=device)
        for turn in turns
    ]
    questions = []
    for turn in turns[1:]:
        texts = [_text_between_answers(processor, conversation, turn) for conversation in messages]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
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
