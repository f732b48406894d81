"""What an answer's KV heads hold of the prompt after each recall."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparsight.cache.compressed_cache import CompressedCache


class Recalled(NamedTuple):
    """What the KV heads of all compressed layers together hold of a prompt after a recall.

    Attributes:
        token: the first token of the answer that is generated with it, counted from 0.
        held: how many KV heads hold each position of the prompt, int16 ``[T]``.
        fetched: how many of these did not keep it when the prompt was compressed, int16 ``[T]``.
    """

    token: int
    held: Tensor
    fetched: Tensor


class RecallLog:
    """Compares what is held after a recall with what the compressed prompt kept.

    Args:
        kept: positions that each KV head kept, ``[H_kv, n]`` padded with -1, by layer.
        length: tokens of the prompt.
        every: tokens from one recall to the next.
    """

    def __init__(self, kept: Mapping[int, Tensor], length: int, every: int) -> None:
        self._length, self._every = length, every
        self._kept = _mask([head for layer in kept.values() for head in layer], length)
        self.recalled: list[Recalled] = []

    def is_due(self, token: int) -> bool:
        """Whether the answer's token with this number is the first one after a recall."""
        return (token - 1) % self._every == 0

    def add(self, token: int, heads: Iterable[Tensor]) -> None:
        """Log the positions ``[n]`` of the entries that each KV head holds, of all layers in order."""
        held = _mask(list(heads), self._length)
        numbers = (each.sum(0, dtype=torch.int16) for each in (held, held & ~self._kept))
        self.recalled.append(Recalled(token, *numbers))


def held_heads(cache: CompressedCache, sequence: int) -> list[Tensor]:
    """Prompt positions that each KV head of a sequence holds, of all compressed layers in order."""
    return [head for layer in cache.report().layers for head in cache.kept_positions(layer)[sequence].cpu()]


def _mask(heads: list[Tensor], length: int) -> Tensor:
    """Which positions of a prompt are among those of each head, bool ``[H, T]``."""
    row = torch.arange(len(heads)).repeat_interleave(torch.tensor([len(each) for each in heads]))
    positions = torch.cat(heads).long()
    of_prompt = (positions >= 0) & (positions < length)
    mask = torch.zeros(len(heads), length, dtype=torch.bool)
    mask[row[of_prompt], positions[of_prompt]] = True
    return mask
