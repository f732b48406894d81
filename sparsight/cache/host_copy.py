"""The full keys and values of a prompt, in host memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = ("int8",)
"""What entries can be stored in, besides their own dtype."""

LARGEST = 127
"""The largest 8-bit code, and the negative of the smallest."""


class HostCopy:
    """Full keys and values of one sequence's prompt, by compressed layer, in host memory.

    Entry ``i`` belongs to the ``i``-th valid token of the prompt. From a GPU the entries go to pinned memory, on a
    stream of their own; on a CPU they are the tensors of the prefill, without a copy. Nothing is written to them again,
    so copies of a cache share them. Entries of the answer are not in it: they were computed from the compressed prompt,
    and a new turn computes them again.

    Args:
        dtype: ``"int8"`` stores 8-bit codes with one scale per token and head, None the entries as they are.

    Attributes:
        layers: what is stored of each layer, every tensor ``[H_kv, T, ...]``: keys and values, or the codes and scales
            of the keys and those of the values.
    """

    def __init__(self, dtype: str | None = None) -> None:
        self.layers: list[tuple[Tensor, ...]] = []
        self._dtype = dtype
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: dict) -> "HostCopy":
        """The same object, which does not change any more."""
        return self

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def add_layer(self, keys: Tensor, values: Tensor) -> None:
        """Add the next layer's keys and values, ``[H_kv, T, D]``."""
        stored = (keys, values) if self._dtype is None else (*quantized(keys), *quantized(values))
        self.layers.append(tuple(map(self._to_host, stored)))

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
        stored = self._stored(layer, start, stop)
        if len(stored) == 2:
            return stored[0], stored[1]
        keys, key_scales, values, value_scales = stored
        return dequantized(keys, key_scales), dequantized(values, value_scales)

    def _stored(self, layer: int, start: int, stop: int | None) -> tuple[Tensor, ...]:
        if self._stream is not None:
            self._stream.synchronize()
        return tuple(each[:, start:stop] for each in self.layers[layer])

    @staticmethod
    def joined(parts: Sequence["HostCopy"]) -> "HostCopy":
        """The tokens of several copies, one after the other."""
        if len(parts) == 1:
            return parts[0]
        joined = HostCopy()
        for layer in range(len(parts[0])):
            stored = zip(*(part._stored(layer, 0, None) for part in parts), strict=True)
            joined.layers.append(tuple(torch.cat(each, dim=1) for each in stored))
        return joined

    def part(self, start: int, stop: int) -> "HostCopy":
        """The tokens ``[start, stop)``, which are views."""
        part = HostCopy()
        part.layers = [self._stored(layer, start, stop) for layer in range(len(self))]
        return part

    def compact(self) -> "HostCopy":
        """The same tokens in tensors that hold nothing else."""
        compact = HostCopy()
        compact.layers = [tuple(map(_own, stored)) for stored in self.layers]
        return compact

    @property
    def tokens(self) -> int:
        """Number of tokens, ``T``."""
        return self.layers[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(each.nbytes for stored in self.layers for each in stored)


def quantized(states: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[H, T, D]`` and scales ``[H, T, 1]``, in the dtype of the states ``[H, T, D]``."""
    scales = states.abs().amax(-1, keepdim=True) / LARGEST
    # Where all components are 0, or the scale is rounded to 0, so are the codes.
    codes = (states.float() / scales.float()).nan_to_num(0, 0, 0).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The states ``[H, T, D]`` of codes and scales, up to half a scale and rounding."""
    return codes.to(scales.dtype) * scales


def stored_bytes(size: int, itemsize: int, dtype: str | None) -> int:
    """Bytes of a key and a value of one token and head, of ``size`` components of ``itemsize`` bytes."""
    return 2 * (size * itemsize if dtype is None else size + itemsize)


def _own(states: Tensor) -> Tensor:
    """The same numbers in a tensor that is no view of a larger one."""
    if states.untyped_storage().nbytes() == states.nbytes:
        return states
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_pinned()).copy_(states)
