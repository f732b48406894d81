"""Examples as token ids, in the chat template's format, with labels for the answers."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from sparsight.reader.page import DIGITS, LETTERS, PATCH
from sparsight.reader.skills import Example

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Batch:
    """Token ids `[B, T]`, padded on the right, and labels `[B, T]`: the next token if it is in an answer, else -100."""

    ids: torch.Tensor
    labels: torch.Tensor


def token_ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    """Ids of tokens by their text."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def pieces(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[tuple[list[int], bool]]:
    """The conversation as runs of tokens, each with a flag for answers."""
    start, picture, user, assistant, newline, end = token_ids(
        tokenizer, "<s>", "<image>", "<|user|>", "<|assistant|>", "\n", "</s>"
    )
    opening = [start, user]
    for image in example.images:
        opening += [picture] * (image.height // PATCH * 24) + [newline]
    runs = [(opening, False)]
    for number, (question, answer) in enumerate(example.turns):
        asked = [] if number == 0 else [user]
        runs.append(([*asked, *tokenizer(question)["input_ids"], assistant], False))
        runs.append(([*tokenizer(answer)["input_ids"], end], True))
    return runs


def collate(sequences: list[list[tuple[list[int], bool]]], pad: int) -> Batch:
    """A batch of sequences, each given as runs of tokens."""
    length = max(sum(len(run) for run, _ in runs) for runs in sequences)
    ids = torch.full((len(sequences), length), pad)
    labels = torch.full((len(sequences), length), -100)
    for row, runs in enumerate(sequences):
        at = 0
        for run, is_answer in runs:
            tokens = torch.tensor(run)
            ids[row, at : at + len(run)] = tokens
            if is_answer:
                labels[row, at - 1 : at + len(run) - 1] = tokens
            at += len(run)
    return Batch(ids, labels)


def batch_of(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Batch:
    """A batch of examples."""
    return collate([pieces(tokenizer, example) for example in examples], tokenizer.pad_token_id)


def repetition(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> Batch:
    """Random strings followed by snippets of themselves, with the tails of the snippets as answers.

    The simplest task of finding an earlier position by its content, which look-up builds on.
    """
    alphabet = np.array(token_ids(tokenizer, *LETTERS, *DIGITS))
    start, newline = token_ids(tokenizer, "<s>", "\n")
    sequences = []
    for _ in range(count):
        text = alphabet[rng.integers(len(alphabet), size=length)].tolist()
        runs: list[tuple[list[int], bool]] = [([start, *text], False)]
        for _ in range(length // 10):
            size = int(rng.integers(6, 12))
            at = int(rng.integers(0, length - size))
            snippet = text[at : at + size]
            runs += [([newline, *snippet[:3]], False), (snippet[3:], True)]
        sequences.append(runs)
    return collate(sequences, tokenizer.pad_token_id)
