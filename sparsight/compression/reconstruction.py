"""The score of KVzip: what the model attends to when it repeats the prompt. It does not depend on the question."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsight.compression.score import BaseScore, Grids
from sparsight.models.prompt import Span
from sparsight.utils import checks

BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}
"""Weights that are computed together, by device type."""

LEAD = 8
"""Tokens of the chunk before that later chunks start with."""


@dataclass(frozen=True)
class Reconstruction(BaseScore):
    """The largest attention that a position receives while the prompt is repeated (KVzip, arXiv 2505.23416, section 3).

    After the prefill the language part processes an instruction and the prompt's own embeddings again, images
    included (see :mod:`sparsight.cache.replay`). A position is as important as the largest weight that any of these
    queries, in any query head of the KV head, gives it.

    Args:
        instructions: token ids of what comes before the first chunk of the prompt, and before each later one, which
            starts with the last tokens of the chunk before; None for the model's tokens of
            :data:`sparsight.methods.kvzip.INSTRUCTIONS`.
        chunk: how many tokens are repeated at a time. Weights are computed over the sinks, the chunk and what is
            processed to repeat it.
        sinks: positions at the prompt's beginning that every chunk attends to.
    """

    kind: ClassVar[str] = "reconstruction"
    needs_full_prompt: ClassVar[bool] = True
    needs_replay: ClassVar[bool] = True
    instructions: tuple[tuple[int, ...], ...] | None = None
    chunk: int = 2000
    sinks: int = 4

    def __post_init__(self) -> None:
        checks.count("chunk", self.chunk, least=1)
        checks.count("sinks", self.sinks)
        if self.instructions is not None:
            if len(self.instructions) != 2:
                raise ValueError(f"instructions must be token ids of two texts, got {len(self.instructions)}.")
            # JSON brings lists, which a frozen part must not hold.
            object.__setattr__(self, "instructions", tuple(map(tuple, self.instructions)))

    def queries(self, span: Span) -> range:
        """No query of the prefill is looked at."""
        return range(span.stop, span.stop)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]``, the results of :func:`largest_attention`."""
        return sums


def largest_attention(
    query: Tensor,
    context: Tensor,
    repeated: Tensor,
    scaling: float,
    value: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """The largest weight that each key of a context receives while it is repeated.

    Every query attends to all of the context and to the repeated keys up to its own.

    Args:
        query: ``[H, r, D]``, after RoPE.
        context: keys ``[H_kv, n, D]``, after RoPE; ``H`` is a multiple of ``H_kv``.
        repeated: the queries' own keys ``[H_kv, r, D]``.
        scaling: factor of the logits.
        value: values ``[H_kv, n + r, D_v]``, if the queries' attention is wanted too.
        output: where that goes, ``[H, r, D_v]``.

    Returns:
        float32 ``[H_kv, n]``.
    """
    kv_heads, length, _ = context.shape
    grouped = query.unflatten(0, (kv_heads, -1))
    count, group = query.shape[1], grouped.shape[1]
    largest = torch.zeros(kv_heads, length, device=context.device)
    elements = BLOCK_ELEMENTS.get(context.device.type, BLOCK_ELEMENTS["cpu"])
    step = max(1, elements // (group * (length + count)))
    for head in range(kv_heads):
        keys = torch.cat([context[head], repeated[head]]).float() * scaling
        values = None if value is None else value[head].float()
        for first in range(0, count, step):
            rows = grouped[head, :, first : first + step].float()
            number = rows.shape[1]
            logits = rows @ keys[: length + first + number].mT
            later = torch.ones(number, number, dtype=torch.bool, device=keys.device).triu_(1)
            logits[..., length + first :].masked_fill_(later, -torch.inf)
            weights = torch.softmax(logits, -1, out=logits)
            torch.maximum(largest[head], weights[..., :length].amax((0, 1)), out=largest[head])
            if values is not None and output is not None:
                attended = weights @ values[: length + first + number]
                output.unflatten(0, (kv_heads, -1))[head, :, first : first + number] = attended
    return largest
