"""VL-Cache and Elastic Cache by brute force, written from the papers' definitions with full attention matrices.

Everything here is slow on purpose: loops over layers, sequences, heads and positions, float64 sums, no shared code with
the package. ``Twin`` runs an unmodified model with a plain ``DynamicCache`` and replaces its attention.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel


@dataclass
class Method:
    """A published method and its numbers."""

    name: str
    budget: float
    threshold: float = 0.01
    floor: float = 0.01
    recent: float = 0.1
    per_head: bool = True
    water_fill: bool = True
    distance: int = 25
    protect_first: int = 1


# Definitions, over one sequence: attention matrices ``[H, T, T]`` of float


def post_vision_rows(vision: list[bool]) -> list[int]:
    length = len(vision)
    last = max((i for i in range(length) if vision[i]), default=None)
    if last is None or last == length - 1:
        return list(range(max(0, length - 32), length))
    return list(range(last + 1, length))


def sparsity(attention: Tensor, rows: list[int], threshold: float) -> float:
    """VL-Cache, section 4.1: share of visible weights below ``p`` times their row's maximum, averaged over heads."""
    shares = []
    for head in attention.double():
        zeroed = sum(int((head[i, : i + 1] < threshold * head[i, : i + 1].max()).sum()) for i in rows)
        shares.append(zeroed / sum(i + 1 for i in rows))
    return sum(shares) / len(shares)


def column_sums(attention: Tensor, rows: list[int], kv_heads: int) -> Tensor:
    """Attention that each key receives from some rows; query heads that share a KV head are averaged. ``[H_kv, T]``."""
    sums = torch.stack([sum(head[i].double() for i in rows) for head in attention])
    group = len(attention) // kv_heads
    return torch.stack([sums[k * group : (k + 1) * group].mean(0) for k in range(kv_heads)])


def layer_shares(sparsities: list[float], budget: float, floor: float, water_fill: bool) -> list[float]:
    """VL-Cache's sparsity-aware budgets, with the paper's clip or with the total restored."""
    density = [1 - value for value in sparsities]
    total = budget * len(density)

    def clipped(scale: float, low: float) -> list[float]:
        return [min(max(scale * value, low), 1.0) for value in density]

    if not water_fill:
        return clipped(total / sum(density), floor)
    low, high = 0.0, 1.0 / min(density)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle, min(floor, budget))) < total else (low, middle)
    return clipped(high, min(floor, budget))


def entries_to_keep(share: float, length: int) -> int:
    return min(max(1, round(share * length)), length)


def best(score: list[float], candidates: list[int], count: int) -> list[int]:
    """The ``count`` candidates with the highest score, ties to the later position."""
    return sorted(candidates, key=lambda j: (-score[j], -j))[:count]


def vl_cache_positions(score: list[float], kept: int, recent: float) -> list[int]:
    length = len(score)
    newest = list(range(length - max(1, round(recent * kept)), length))[-kept:]
    others = [j for j in range(length) if j not in newest]
    return sorted(newest + best(score, others, kept - len(newest)))


def elastic_anchors(score: list[float], kept: int, protect_first: int) -> list[int]:
    length = len(score)
    anchors = [length - 1]
    for j in range(protect_first):
        if len(anchors) < kept and j not in anchors:
            anchors.append(j)
    others = [j for j in range(length) if j not in anchors]
    return sorted(anchors + best(score, others, kept - len(anchors)))


def merged(states: Tensor, anchors: list[int]) -> list[Tensor]:
    """Mean over each anchor's bucket: every position joins the nearest anchor, the earlier of two equally near."""
    buckets: dict[int, list[Tensor]] = {anchor: [] for anchor in anchors}
    for j, state in enumerate(states):
        buckets[min(anchors, key=lambda anchor: (abs(anchor - j), anchor))].append(state.double())
    return [(sum(bucket) / len(bucket)).to(states.dtype) for bucket in buckets.values()]


# The methods in a running model


@dataclass
class Entry:
    position: int
    key: Tensor
    value: Tensor


@dataclass
class Row:
    """What one sequence holds in one layer: entries in order of position, for every KV head."""

    heads: list[list[Entry]]
    share: float
    fixed: int


@dataclass
class Twin:
    """One run of a method by brute force."""

    method: Method
    vision: list[list[bool]]
    valid: list[list[bool]]
    attention: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rows: list[list[Row]] = field(default_factory=list)
    kept: list[list[Row]] = field(default_factory=list)
    sparsity: list[list[float]] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    layers: int = 0

    def prefill(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.attention.append(full_attention(query, key, self.valid, scaling))
        self.keys.append(key)
        self.values.append(value)
        mask = causal_mask(self.valid, query.shape[2])
        output = sdpa(query, key, value, mask if not mask.all() else None, scaling)
        if len(self.keys) == self.layers:
            self.compress()
        return output

    def compress(self) -> None:
        self.rows = [[] for _ in range(self.layers)]
        self.sparsity = [[] for _ in range(self.layers)]
        self.shares = [[] for _ in range(self.layers)]
        for b, valid in enumerate(self.valid):
            positions = [j for j, flag in enumerate(valid) if flag]
            start, stop = positions[0], positions[-1] + 1
            attention = [layer[b, :, start:stop, start:stop] for layer in self.attention]
            rows = post_vision_rows(self.vision[b][start:stop])
            gammas = [sparsity(layer, rows, self.method.threshold) for layer in attention]
            if self.method.name == "vl-cache":
                shares = layer_shares(gammas, self.method.budget, self.method.floor, self.method.water_fill)
            else:
                rows = list(range(stop - start))
                shares = [self.method.budget] * self.layers
            for index in range(self.layers):
                score = column_sums(attention[index], rows, self.keys[index].shape[1])
                if self.method.name != "vl-cache" or not self.method.per_head:
                    score = score.mean(0, keepdim=True).expand_as(score)
                kept = entries_to_keep(shares[index], stop - start)
                self.sparsity[index].append(gammas[index])
                self.shares[index].append(shares[index])
                heads = [
                    self.reduced(
                        self.keys[index][b, h, start:stop], self.values[index][b, h, start:stop], s, kept, start
                    )
                    for h, s in enumerate(score.tolist())
                ]
                fixed = max(kept - self.method.distance, self.method.protect_first)
                self.rows[index].append(Row(heads, shares[index], fixed))
        self.kept = [
            [Row([list(head) for head in row.heads], row.share, row.fixed) for row in rows] for rows in self.rows
        ]

    def reduced(self, keys: Tensor, values: Tensor, score: list[float], kept: int, start: int) -> list[Entry]:
        if self.method.name == "vl-cache":
            positions = vl_cache_positions(score, kept, self.method.recent)
            return [Entry(start + j, keys[j], values[j]) for j in positions]
        anchors = elastic_anchors(score, kept, self.method.protect_first)
        states = zip(anchors, merged(keys, anchors), merged(values, anchors), strict=True)
        return [Entry(start + j, key, value) for j, key, value in states]

    def decode(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        position = key.shape[2] - 1
        group = query.shape[1] // key.shape[1]
        output = torch.empty_like(query)
        for b, row in enumerate(self.rows[module.layer_idx]):
            tokens_seen = position + 1 - self.valid[b].index(True)
            for h, entries in enumerate(row.heads):
                if self.method.name == "elastic":
                    while len(entries) + 1 > row.share * tokens_seen and len(entries) > row.fixed:
                        del entries[row.fixed]
                entries.append(Entry(position, key[b, h, -1], value[b, h, -1]))
                keys = torch.stack([entry.key for entry in entries]).double()
                values = torch.stack([entry.value for entry in entries]).double()
                for q in range(h * group, (h + 1) * group):
                    weights = (keys @ query[b, q, 0].double() * scaling).softmax(0)
                    output[b, q, 0] = (weights @ values).to(query.dtype)
        return output

    def positions(self, layer: int, b: int, h: int) -> list[int]:
        return [entry.position for entry in self.rows[layer][b].heads[h]]


def causal_mask(valid: list[list[bool]], length: int) -> Tensor:
    """Bool ``[B, 1, T, T]``: key ``j`` is valid and not later than query ``i``."""
    keys = torch.tensor(valid)[:, None, None, :]
    return keys & torch.ones(length, length, dtype=torch.bool).tril()


def full_attention(query: Tensor, key: Tensor, valid: list[list[bool]], scaling: float) -> Tensor:
    """Post-softmax attention ``[B, H, T, T]`` in float32."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.float() @ key.float().mT * scaling
    return logits.masked_fill(~causal_mask(valid, query.shape[2]), -math.inf).softmax(-1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, attn_mask=mask, scale=scaling)


@contextmanager
def attention_by(model: PreTrainedModel, twin: Twin) -> Iterator[None]:
    """Let ``twin`` compute the attention of a model's language part."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        step = twin.prefill if query.shape[2] == key.shape[2] else twin.decode
        return step(module, query, key, value, scaling).transpose(1, 2).contiguous(), None

    language = model.get_decoder()
    own = language.config._attn_implementation
    twin.layers = language.config.num_hidden_layers
    AttentionInterface.register("twin", attention)
    AttentionMaskInterface.register("twin", AttentionMaskInterface()["sdpa"])
    language.set_attn_implementation("twin")
    try:
        yield
    finally:
        language.set_attn_implementation(own)


@torch.no_grad()
def run(
    model: PreTrainedModel, inputs: dict[str, Tensor], method: Method, tokens: int, vision: Tensor
) -> tuple[Twin, Any]:
    """Greedy generation under a method by brute force: the twin, and ``generate``'s output with its scores."""
    twin = Twin(method, vision.tolist(), inputs["attention_mask"].bool().tolist())
    with attention_by(model, twin):
        output = model.generate(
            **inputs,
            past_key_values=DynamicCache(config=model.get_decoder().config),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return twin, output
