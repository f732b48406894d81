"""The full keys and values of a prompt, in host memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """Full keys and values of one sequence's prompt, by compressed layer, in host memory.

    Entry ``i`` belongs to the ``i``-th valid token of the prompt. From a GPU the entries go to pinned memory, on a
    stream of their own; on a CPU they are the tensors of the prefill, without a copy. Nothing is written to them again,
    so copies of a cache share them. Entries of the answer are not in it: they were computed from the compressed prompt,
    and a new turn computes them again.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: dict) -> "HostCopy":
        """The same object, which does not change any more."""
        return self

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def add_layer(self, keys: Tensor, values: Tensor) -> None:
        """Add the next layer's keys and values, ``[H_kv, T, D]``."""
        self._layers.append((self._to_host(keys), self._to_host(values)))

    def _to_host(self, states: Tensor) -> Tensor:
        if states.device.type != "cuda":
            return states
        if self._stream is None:
            self._stream = torch.cuda.Stream(states.device)
        copied = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(self._stream):
            copied.copy_(states, non_blocking=True)
        # The memory of the source is not reused before it has been read.
        states.record_stream(self._stream)
        return copied

    def states(self, layer: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, n, D]`` of the tokens ``[start, stop)`` in a layer, counted among the compressed."""
        if self._stream is not None:
            self._stream.synchronize()
        keys, values = self._layers[layer]
        return keys[:, start:stop], values[:, start:stop]

    @staticmethod
    def joined(parts: Sequence["HostCopy"]) -> "HostCopy":
        """The tokens of several copies, one after the other."""
        if len(parts) == 1:
            return parts[0]
        joined = HostCopy()
        for layer in range(len(parts[0])):
            keys, values = zip(*(part.states(layer) for part in parts), strict=True)
            joined._layers.append((torch.cat(keys, dim=1), torch.cat(values, dim=1)))
        return joined

    def part(self, start: int, stop: int) -> "HostCopy":
        """The tokens ``[start, stop)``, which are views."""
        part = HostCopy()
        part._layers = [self.states(layer, start, stop) for layer in range(len(self))]
        return part

    def compact(self) -> "HostCopy":
        """The same tokens in tensors that hold nothing else."""
        compact = HostCopy()
        compact._layers = [(_own(keys), _own(values)) for keys, values in self._layers]
        return compact

    @property
    def tokens(self) -> int:
        """Number of tokens, ``T``."""
        return self._layers[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers)


def _own(states: Tensor) -> Tensor:
    """The same numbers in a tensor that is no view of a larger one."""
    if states.untyped_storage().nbytes() == states.nbytes:
        return states
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_pinned()).copy_(states)
