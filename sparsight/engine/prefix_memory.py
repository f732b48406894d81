"""Keys and values of prompts that were processed before, in host memory: a new prompt is computed where it differs."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsight.cache.host_copy import HostCopy
from sparsight.engine.prefix_files import PrefixFiles
from sparsight.engine.prompt_chain import Chain, common_tokens


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
        files: where prompts are written to, and read from if they are not held.

    Attributes:
        nbytes: bytes held.
        reserved: bytes of ``max_bytes`` that running answers use, to recall from their prompts.
    """

    def __init__(self, max_bytes: int, files: PrefixFiles | None = None) -> None:
        self.max_bytes, self.nbytes, self.reserved, self._files = max_bytes, 0, 0, files
        self._prefixes: OrderedDict[bytes, _Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, chain: Chain) -> HostCopy | None:
        """Keys and values of the longest known beginning of a prompt; None if there is none."""
        prefix, tokens = self._longest(chain)
        path, in_file = (None, 0) if self._files is None else self._files.longest(chain)
        if self._files is not None and path is not None and in_file > tokens:
            read = self._files.read(path)
            if read is not None:
                self._hold(*read)
                return read[1].part(0, common_tokens(read[0], chain))
        return None if prefix is None else prefix.copy(tokens)

    def put(self, chain: Chain, copied: HostCopy, image_tokens: Mapping[bytes, int]) -> None:
        """Hold a prompt's keys and values, unless they are too many together with those that it continues.

        Args:
            chain: of the prompt.
            copied: its keys and values.
            image_tokens: numbers of vision tokens of its images, by their keys.
        """
        self._hold(chain, copied)
        if self._files is not None:
            self._files.write(chain, copied, image_tokens)

    def reserve(self, nbytes: int) -> None:
        """Leave ``nbytes`` to running answers: drop prompts until the others fit into the rest."""
        self.reserved = nbytes
        self._make_room(0)

    def close(self) -> None:
        """Write what waits to be written."""
        if self._files is not None:
            self._files.close()

    def _hold(self, chain: Chain, copied: HostCopy) -> None:
        parent, start = self._longest(chain)
        if start == len(chain):
            return
        own = copied.part(start, len(chain))
        if parent is not None:
            # Prompts that are continued are not dropped.
            parent.children += 1
        if not self._make_room(own.nbytes):
            if parent is not None:
                parent.children -= 1
            return
        self._prefixes[chain[-1]] = _Prefix(chain, start, own.compact(), parent)
        self.nbytes += own.nbytes

    def _make_room(self, needed: int) -> bool:
        """Drop the prompts that were used longest ago until ``needed`` bytes more fit; whether they do."""
        while self.nbytes + self.reserved + needed > self.max_bytes:
            last = next((key for key, each in self._prefixes.items() if not each.children), None)
            if last is None:
                return False
            self._drop(last)
        return True

    def _longest(self, chain: Chain) -> tuple[_Prefix | None, int]:
        """The prompt that has most of the first tokens in common with another one, the last of them its own."""
        longest, tokens = None, 0
        for prefix in self._prefixes.values():
            common = common_tokens(prefix.chain, chain)
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
