"""Keys and values of prompts that were processed before, in host memory: a new prompt is computed where it differs."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsight.cache.host_copy import HostCopy

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


@dataclass(eq=False)
class _Prefix:
    """The tokens of a prompt that are not those of the one that it continues.

    Attributes:
        chain: of the complete prompt.
        start: how many of its first tokens are those of the parent.
        own: keys and values of the others.
        children: how many prompts continue this one.
    """

    chain: Chain
    start: int
    own: HostCopy
    parent: "_Prefix | None"
    children: int = field(default=0)

    def common(self, chain: Chain) -> int:
        """How many of the first tokens of a prompt are those of this one."""
        low, high = 0, min(len(chain), len(self.chain))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if chain[middle - 1] == self.chain[middle - 1] else (low, middle - 1)
        return low

    def copy(self, tokens: int) -> HostCopy:
        """Keys and values of the first tokens, of which some are its own."""
        parts = [self.own.part(0, tokens - self.start)]
        prefix = self
        while prefix.parent is not None:
            start, prefix = prefix.start, prefix.parent
            parts.append(prefix.own.part(0, start - prefix.start))
        return HostCopy.joined(parts[::-1])


class PrefixMemory:
    """Full keys and values of the most recently used prompts; what prompts have in common is held once.

    Args:
        max_bytes: bytes of keys and values that may be held.

    Attributes:
        nbytes: bytes held.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._prefixes: OrderedDict[bytes, _Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, chain: Chain) -> HostCopy | None:
        """Keys and values of the longest known beginning of a prompt; None if there is none."""
        prefix, tokens = self._longest(chain)
        return None if prefix is None else prefix.copy(tokens)

    def put(self, chain: Chain, copied: HostCopy) -> None:
        """Hold a prompt's keys and values, unless they are too many together with those that it continues."""
        parent, start = self._longest(chain)
        if start == len(chain):
            return
        own = copied.part(start, len(chain))
        if parent is not None:
            # Prompts that are continued are not dropped.
            parent.children += 1
        while self.nbytes + own.nbytes > self.max_bytes:
            last = next((key for key, each in self._prefixes.items() if not each.children), None)
            if last is None:
                break
            self._drop(last)
        if self.nbytes + own.nbytes > self.max_bytes:
            if parent is not None:
                parent.children -= 1
            return
        self._prefixes[chain[-1]] = _Prefix(chain, start, own.compact(), parent)
        self.nbytes += own.nbytes

    def _longest(self, chain: Chain) -> tuple[_Prefix | None, int]:
        """The prompt that has most of the first tokens in common with another one, the last of them its own."""
        longest, tokens = None, 0
        for prefix in self._prefixes.values():
            common = prefix.common(chain)
            if common > tokens:
                longest, tokens = prefix, common
        while longest is not None and longest.start >= tokens:
            longest = longest.parent
        used = longest
        while used is not None:
            self._prefixes.move_to_end(used.chain[-1])
            used = used.parent
        return longest, tokens

    def _drop(self, key: bytes) -> None:
        prefix = self._prefixes.pop(key)
        self.nbytes -= prefix.own.nbytes
        if prefix.parent is not None:
            prefix.parent.children -= 1
