"""Hashes of prompts, token by token, by which two are compared."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

Chain = list[bytes]
"""For each token of a prompt the SHA-256 of everything up to it, pixels included."""


def chain_of(token_ids: Tensor, positions: Tensor, contents: Mapping[int, bytes], salt: str) -> Chain:
    """The chain of a prompt: two are equal up to a token exactly if the prompts are, and their salts.

    Args:
        token_ids: ``[1, T]``.
        positions: of each token, ``[1, T]`` or ``[3, 1, T]``.
        contents: what the prompt has from a token on, by the token's index: keys of the images that begin there.
        salt: prompts of different salts share nothing.
    """
    # Of fixed sizes, so that no two prompts are the same bytes.
    tokens = torch.cat([token_ids, positions.reshape(-1, token_ids.shape[1])]).T.long().cpu().contiguous().numpy()
    digest, chain = hashlib.sha256(salt.encode()).digest(), []
    for index, token in enumerate(tokens):
        content = hashlib.sha256(contents.get(index, b"")).digest()
        digest = hashlib.sha256(digest + token.tobytes() + content).digest()
        chain.append(digest)
    return chain


def common_tokens(one: Chain, other: Chain) -> int:
    """How many of the first tokens of two prompts are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[middle - 1] == other[middle - 1] else (low, middle - 1)
    return low
