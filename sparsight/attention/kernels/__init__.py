"""Triton kernels for NVIDIA GPUs: the same arithmetic as the torch versions, which judge them in the tests.

Triton is imported when a kernel is first called.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

LARGEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(*states: Tensor) -> bool:
    """Whether the kernels take tensors ``[..., D]``: on an NVIDIA GPU, with Triton, where no gradient is asked for."""
    return all(
        each.is_cuda
        and each.dtype in DTYPES
        and each.shape[-1] <= LARGEST_HEAD
        and not (each.requires_grad and torch.is_grad_enabled())
        for each in states
    ) and (_has_triton() and torch.version.hip is None)


def attention_sums(
    query: Tensor, key: Tensor, scaling: float, threshold: float | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`sparsight.attention.kernels.sums.attention_sums`."""
    from sparsight.attention.kernels import sums

    return sums.attention_sums(query, key, scaling, threshold, visible)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    scaling: float | None,
) -> Tensor:
    """:func:`sparsight.attention.kernels.decode.attend`; ``scaling`` is ``D ** -0.5`` if None."""
    from sparsight.attention.kernels import decode

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode.attend(query, keys, values, positions, starts, lengths, longest, scaling)[0]


def attend_and_score(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    """:func:`attend`, and the attention that each slot of each row received, float32 ``[N, longest]``."""
    from sparsight.attention.kernels import decode

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    states = query, keys, positions, starts, lengths
    output, normalisers = decode.attend(query, keys, values, positions, starts, lengths, longest, scaling)
    return output, decode.received(*states, normalisers, longest, scaling)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
