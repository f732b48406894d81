"""What a cache holds, against what the full cache would hold."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparsight.utils.text import mebibytes


@dataclass(frozen=True)
class Report:
    """What a :class:`~sparsight.CompressedCache` holds.

    Attributes:
        method: the recipe's name.
        budget: the recipe's budget.
        layers: the model's layers that are compressed; the lists by layer follow them.
        prompt_tokens: valid prompt tokens of each sequence.
        vision_tokens: vision tokens of each sequence's prompt.
        tokens_seen: tokens of each sequence that the model has processed, padding included.
        exact: whether every token of the prompt saw all of those before it, as it does unless chunks of the prompt were
            cut to the prefill's bound.
        cut_short: layers that kept fewer entries than were planned, since the prefill's bound left no more.
        kept: prompt entries kept at compression, by layer (of those that are compressed), sequence and KV head.
        held: entries held now, by layer, sequence and KV head.
        sparsity: share of post-vision attention that the threshold filter zeroes, by layer and sequence; None where the
            recipe does not measure it.
        entry_bytes: bytes of the keys and values of the entries held.
        bytes_held: bytes that the tensors of the cache occupy: entries, their positions, and spare capacity.
        full_bytes: bytes that the full cache's keys and values would occupy for the tokens seen.
        host_bytes: bytes of the full keys and values of the prompts in host memory; 0 unless they are kept.
    """

    method: str
    budget: float
    layers: list[int]
    prompt_tokens: list[int]
    vision_tokens: list[int]
    tokens_seen: int
    exact: bool
    cut_short: list[int]
    kept: list[list[list[int]]]
    held: list[list[list[int]]]
    sparsity: list[list[float]] | None
    entry_bytes: int
    bytes_held: int
    full_bytes: int
    host_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def kept_per_layer(self) -> list[float]:
        """Prompt entries kept by each layer, a mean over sequences and KV heads."""
        return [_mean(heads for sequence in layer for heads in sequence) for layer in self.kept]

    def caveats(self) -> list[str]:
        """What the prefill's bound made different from a prefill without, a sentence each."""
        said = []
        if not self.exact:
            said.append("Approximate: each chunk of the prompt attended only to what the bound left of earlier chunks.")
        if self.cut_short:
            layers = ", ".join(map(str, self.cut_short))
            said.append(f"Cut short: fewer entries than planned were left by the bound in layers {layers}.")
        return said

    def memory(self) -> str:
        """Bytes of the entries held, against the full cache's, and what spare capacity adds."""
        share = f"{self.entry_bytes / max(self.full_bytes, 1):.1%}"
        spare = f"{mebibytes(self.bytes_held)} with spare capacity"
        host = f"; {mebibytes(self.host_bytes)} in host memory" if self.host_bytes else ""
        return f"{mebibytes(self.entry_bytes)} held of {mebibytes(self.full_bytes)} ({share}), {spare}{host}"

    def __str__(self) -> str:
        prompt, vision = sum(self.prompt_tokens), sum(self.vision_tokens)
        if not self.tokens_seen:
            return f"{self.method} at {self.budget:.1%}: no token of the prompt has been processed yet"
        lines = [
            f"{self.method} at {self.budget:.1%}: {prompt} prompt tokens, {vision} of them vision",
            self.memory(),
            *self.caveats(),
            "layer  kept per head   share  sparsity",
        ]
        length = prompt / len(self.prompt_tokens)
        for index, (layer, kept) in enumerate(zip(self.layers, self.kept_per_layer(), strict=False)):
            sparsity = "-" if self.sparsity is None else f"{_mean(self.sparsity[index]):.3f}"
            lines.append(f"{layer:5}  {kept:13.1f}  {kept / length:6.1%}  {sparsity:>8}")
        return "\n".join(lines)


def _mean(numbers: Iterable[float]) -> float:
    return statistics.fmean(numbers)
