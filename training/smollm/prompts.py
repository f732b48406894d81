"""Examples in the format of `sparsight.models.reader_30.CHAT_TEMPLATE`."""

from transformers import PreTrainedTokenizerFast

from sparsight.reader.page import PATCH
from sparsight.reader.skills import Example
from training.prompt import Batch, collate
from training.targets import GRID

IMAGE = -1
"""Stands for a patch among token ids."""


def answer_tokens(tokenizer: PreTrainedTokenizerFast, answer: str) -> list[int]:
    """An answer with the end of its turn."""
    return list(tokenizer(f"{answer}<|im_end|>")["input_ids"])


def pieces(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[tuple[list[int], bool]]:
    """The conversation as runs of tokens, each with a flag for answers; `IMAGE` stands for every patch."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    newline, start_user = tokens("\n"), tokens("<|im_start|>user\n")
    opening = list(start_user)
    for image in example.images:
        opening += [IMAGE] * (image.height // PATCH * GRID) + newline
    runs = [(opening, False)]
    for number, (question, answer) in enumerate(example.turns):
        before = [] if number == 0 else newline + start_user
        runs.append((before + tokens(f"{question}<|im_end|>\n<|im_start|>assistant\n"), False))
        runs.append((answer_tokens(tokenizer, answer), True))
    return runs


def batch_of(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Batch:
    """A batch of examples, padded on the right."""
    return collate([pieces(tokenizer, example) for example in examples], tokenizer.pad_token_id)
