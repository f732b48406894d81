"""The published methods by brute force, written from the papers' definitions with full attention matrices.

Everything here is slow on purpose: loops over layers, sequences, heads and positions, float64 sums, no shared code with
the package. ``Twin`` runs an unmodified model with a plain ``DynamicCache`` and replaces its attention.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from tests.support.released import common, elastic, look_m, prefixkv, pyramidkv

WINDOWED = ("snapkv", "pyramidkv", "adakv", "sparsemm")
"""Methods whose scores are SnapKV's."""


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
    window: int = 32
    pool: int = 7
    pooling: str = "max"
    steepness: float = 20.0
    sinks: int = 4
    floor_of_heads: float = 0.2
    elite: float = 0.9
    head_scores: tuple[tuple[float, ...], ...] = ()
    equal: float = 0.1
    decode: str = ""
    height: int = 1
    width: int = 5
    weight: float = 0.15
    floor_of_all: float = 0.1
    merge: str = "pivotal"
    every: int = 4
    window_of_recall: tuple[int, int] = (1, 7)
    prior: float = 0.0

    @property
    def rule(self) -> str:
        """The decode rule: the method's own, or the one that it is combined with."""
        own = {"elastic": "fixed-point", "prefixkv": "fixed-point", "streaming-llm": "sliding", "h2o": "heavy-hitter"}
        return self.decode or own.get(self.name, "grow")

    def fitted_window(self, length: int) -> int:
        """The window of a prompt: at most two thirds of the entries that the budget allows it."""
        return max(1, min(self.window, 2 * round(self.budget * length) // 3))


# Definitions, over one sequence: attention matrices ``[H, T, T]`` of float


def post_vision_rows(vision: list[bool]) -> list[int]:
    length = len(vision)
    last = max((i for i in range(length) if vision[i]), default=None)
    if last is None or last == length - 1:
        return list(range(max(0, length - 32), length))
    return list(range(last + 1, length))


def sparsity(attention: Tensor, rows: list[int], threshold: float, visible: Tensor | None = None) -> float:
    """VL-Cache, section 4.1: share of visible weights below ``p`` times their row's maximum, averaged over heads.

    A query sees the keys up to its own, or those that ``visible`` ``[T, T]`` tells.
    """
    length = attention.shape[-1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() if visible is None else visible
    shares = []
    for head in attention.double():
        zeroed = sum(int((head[i, visible[i]] < threshold * head[i, visible[i]].max()).sum()) for i in rows)
        shares.append(zeroed / sum(int(visible[i].sum()) for i in rows))
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


def window_pooled(score: list[float], window: int, pool: int, kind: str) -> list[float]:
    """SnapKV: scores before the window are pooled; the window itself always stays."""
    before = max(len(score) - window, 0)
    return [*common.pool(np.array(score[:before]), pool, kind).tolist(), *[math.inf] * (len(score) - before)]


def grid_pooled(score: list[float], grids: list[list[list[int]]], height: int, width: int) -> list[float]:
    """Sparsight: the largest score in a window of the image's patches; without an image, along the sequence."""
    if not grids:
        return [max(score[max(0, j - width // 2) : j + width // 2 + 1]) for j in range(len(score))]
    pooled = list(score)
    for grid in grids:
        for y, row in enumerate(grid):
            for x, position in enumerate(row):
                lines = grid[max(0, y - height // 2) : y + height // 2 + 1]
                near = [j for line in lines for j in line[max(0, x - width // 2) : x + width // 2 + 1]]
                pooled[position] = max(score[j] for j in near)
    return pooled


def sparsight_scores(
    attention: Tensor,
    post_vision: list[int],
    vision: list[bool],
    values: Tensor,
    grids: list[list[list[int]]],
    method: Method,
) -> list[list[float]]:
    """Sparsight: for every KV head, attention with neighbours, and values far from the image's mean by its peaks."""
    attention, values = attention.double(), values.double()
    rows, seen = post_vision[-64:], [j for j, flag in enumerate(vision) if flag]
    group, length = len(attention) // len(values), len(vision)
    scores = []
    for h, value in enumerate(values):
        heads = attention[h * group : (h + 1) * group]
        mean, last = heads[:, rows].mean((0, 1)), heads[:, rows[-1]].mean(0)
        pooled = grid_pooled(((mean + last) / 2).tolist(), grids, method.height, method.width)
        peaks = [sum(max((head[i, j].item() for j in seen), default=0) for head in heads) / group for i in rows]
        peak = (sum(peaks) / len(rows) + peaks[-1]) / 2
        center = value[seen].mean(0)
        far = {j: math.dist(value[j].tolist(), center.tolist()) for j in seen}
        spread = max(far.values(), default=0) - min(far.values(), default=0)
        distinct = [(far[j] - min(far.values())) / spread if j in far and spread else 0.0 for j in range(length)]
        scores.append([s + method.weight * peak * d for s, d in zip(pooled, distinct, strict=True)])
    return scores


def counts_of_all(scores: list[list[list[float]]], budget: float, floor: float) -> list[list[int]]:
    """The best entries of all heads in all layers, of which the last always is, with an equal share for every head."""
    heads, length = len(scores[0]), len(scores[0][0])
    everyone = [
        (math.inf if j == length - 1 else score, place)
        for place, head in enumerate(head for layer in scores for head in layer)
        for j, score in enumerate(head)
    ]
    number = len(scores) * heads
    total = max(number, round(budget * number * length))
    winners = [place for _, place in sorted(everyone, key=lambda one: -one[0])[:total]]
    exact = [floor * total / number + (1 - floor) * winners.count(place) for place in range(number)]
    counts = largest_remainders(exact, total)
    return [counts[first : first + heads] for first in range(0, number, heads)]


def pyramid_budgets(layers: int, keep: float, length: int, window: float, steepness: float) -> list[float]:
    """PyramidKV: the released code's limits on the paper's line, without its rounding."""
    if layers == 1 or 2 * (keep - window) > length:
        return [keep] * layers
    line = pyramidkv.pyramidkv_shares(layers, keep, window, steepness)
    if line[0] <= length:
        return line
    # The first layer is full; the last has as much more than planned as the first has less.
    last = 2 * keep - length
    return [length - (length - last) * layer / (layers - 1) for layer in range(layers)]


def adakv_counts(scores: list[list[float]], equal: int, always: int, floor: float) -> list[int]:
    """AdaKV, algorithm 1: one selection over all heads of a layer, then every head is brought nearer to its floor."""
    length = len(scores[0])
    everyone = [
        (math.inf if j >= length - always else score, h)
        for h, head in enumerate(scores)
        for j, score in enumerate(head)
    ]
    winners = [h for _, h in sorted(everyone, key=lambda one: -one[0])[: equal * len(scores)]]
    exact = [floor * equal + (1 - floor) * winners.count(h) for h in range(len(scores))]
    return largest_remainders(exact, equal * len(scores))


def largest_remainders(exact: list[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``: the largest remainders are rounded up, of equal ones the first."""
    whole = [math.floor(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: -round(exact[index] - whole[index], 9))
    for index in by_remainder[: total - sum(whole)]:
        whole[index] += 1
    return whole


def elite_scores(
    attention: Tensor, post_vision: list[int], vision: list[bool], kv_heads: int, threshold: float
) -> tuple[list[list[float]], list[list[float]]]:
    """AirCache: what selection goes by, and the importance of vision tokens, for every KV head."""
    attention = attention.double()
    heads, length = len(attention), len(vision)
    last = [sum(head[-1, j] / head[-1, post_vision].sum() for head in attention) / heads for j in post_vision]
    elite = [i for i, weight in zip(post_vision, last, strict=True) if weight >= threshold * max(last)]
    importance = torch.zeros(heads, length, dtype=torch.float64)
    for h, head in enumerate(attention):
        for i in elite:
            among = sum(head[i, j] for j in range(length) if vision[j] or j in elite)
            for j in range(length):
                importance[h, j] += (head[i, j] / among if vision[j] else head[i, j]) / len(elite)
    grouped = importance.unflatten(0, (kv_heads, -1)).mean(1).tolist()
    scores = [[s + (0 if seen else max(head)) for s, seen in zip(head, vision, strict=True)] for head in grouped]
    return scores, [[s for s, seen in zip(head, vision, strict=True) if seen] for head in grouped]


def aircache_shares(importance: list[list[list[float]]], vision: list[bool], budget: float) -> list[float]:
    """AirCache: layers share the vision tokens' budget by strength and skewness; all hold the text."""
    length, seen = len(vision), sum(vision)
    text = length - seen
    if not seen or budget * length <= text:
        return [budget] * len(importance)
    strengths, skews = [], []
    for layer in importance:
        mean_head = [sum(head[i] for head in layer) / len(layer) for i in range(seen)]
        mean = sum(mean_head) / seen
        deviation = math.sqrt(sum((value - mean) ** 2 for value in mean_head) / (seen - 1))
        cubes = sum(((value - mean) / deviation) ** 3 for value in mean_head) if deviation else 0.0
        strengths.append(sum(mean_head))
        skews.append(max(0.0, seen / ((seen - 1) * (seen - 2)) * cubes))
    weights = [(s + k) / 2 for s, k in zip(over_mean(strengths), over_mean(skews), strict=True)]
    ratio = (budget * length - text) / seen
    return [(text + share * seen) / length for share in capped(weights, ratio * len(weights))]


def over_mean(numbers: list[float]) -> list[float]:
    return [number * len(numbers) / sum(numbers) for number in numbers] if any(numbers) else [1.0] * len(numbers)


def sparsemm_shares(
    scores: tuple[tuple[float, ...], ...], length: int, budget: float, window: int, equal: float
) -> Any:
    """SparseMM: a window, an equal part and a part by score for every head; what a full one cannot hold
    goes to the others by their scores."""
    flat = [score for layer in scores for score in layer]
    window = min(window / length, budget)
    least = window + equal * (budget - window)
    extra = (
        capped([score / (1 - least) for score in flat], (budget - least) / (1 - least) * len(flat)) if least < 1 else 0
    )
    shares = [least + (1 - least) * share for share in extra] if least < 1 else [1.0] * len(flat)
    width = len(scores[0])
    return [shares[start : start + width] for start in range(0, len(flat), width)]


def capped(weights: list[float], total: float) -> list[float]:
    """Shares in proportion to ``weights``, none above 1, that sum to ``total``: full ones are settled one by one."""
    shares = [0.0] * len(weights)
    open_ones = list(range(len(weights)))
    while open_ones:
        rest = total - sum(shares)
        if not any(weights[i] for i in open_ones):
            weights = [1.0] * len(weights)
        scale = rest / sum(weights[i] for i in open_ones)
        full = [i for i in open_ones if scale * weights[i] > 1]
        for i in full or open_ones:
            shares[i] = 1.0 if full else scale * weights[i]
        open_ones = [i for i in open_ones if i not in full] if full else []
    return shares


# The methods in a running model


@dataclass(eq=False)
class Entry:
    position: int
    key: Tensor
    value: Tensor
    score: float = 0.0


@dataclass
class Row:
    """What one sequence holds in one layer, for every KV head: entries in order of position, and its numbers."""

    heads: list[list[Entry]]
    shares: list[float]
    fixed: list[int]


@dataclass
class Twin:
    """One run of a method by brute force.

    Tokens with the same number in ``blocks``, but for -1, see each other in both directions. ``grids`` are the
    positions of each image's patches, rows from the top.
    """

    method: Method
    vision: list[list[bool]]
    valid: list[list[bool]]
    blocks: list[list[int]] | None = None
    grids: list[list[list[list[int]]]] | None = None
    attention: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rows: list[list[Row]] = field(default_factory=list)
    kept: list[list[Row]] = field(default_factory=list)
    sparsity: list[list[float]] = field(default_factory=list)
    shares: list[list[list[float]]] = field(default_factory=list)
    importance: list[list[list[float]]] = field(default_factory=list)
    scores: list[list[list[list[float]]]] = field(default_factory=list)
    layers: int = 0

    def prefill(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.attention.append(full_attention(query, key, self.valid, scaling, self.blocks))
        self.keys.append(key)
        self.values.append(value)
        mask = visibility(self.valid, query.shape[2], self.blocks)
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
            seen = visibility(self.valid, len(valid), self.blocks)[b, 0, start:stop, start:stop]
            gammas = [sparsity(layer, rows, self.method.threshold, seen) for layer in attention]
            vision = self.vision[b][start:stop]
            self.importance = []
            grids = [[[j - start for j in row] for row in grid] for grid in self.grids[b]] if self.grids else []
            scores = [
                self.score(layer, rows, vision, values[b, :, start:stop], grids)
                for layer, values in zip(attention, self.values, strict=True)
            ]
            self.scores.append(scores)
            shares = self.layer_shares(gammas, scores, vision)
            for index in range(self.layers):
                by_head = shares[index] if isinstance(shares[index], list) else [shares[index]] * len(scores[index])
                kept = [entries_to_keep(share, stop - start) for share in by_head]
                self.sparsity[index].append(gammas[index])
                self.shares[index].append(by_head)
                keys, values = self.keys[index][b, :, start:stop], self.values[index][b, :, start:stop]
                heads = self.reduced(attention[index], keys, values, vision, scores[index], kept, start)
                fixed = [
                    elastic.elastic_point(count, self.method.distance, self.method.protect_first) for count in kept
                ]
                if self.method.name == "prefixkv":
                    fixed = [prefixkv.prefixkv_point(count, self.method.distance) for count in kept]
                if self.method.rule == "sliding":
                    fixed = [self.method.sinks] * len(kept)
                self.rows[index].append(Row(heads, by_head, fixed))
        self.kept = [
            [Row([list(head) for head in row.heads], row.shares, row.fixed) for row in rows] for rows in self.rows
        ]

    def score(
        self,
        attention: Tensor,
        post_vision: list[int],
        vision: list[bool],
        values: Tensor,
        grids: list[list[list[int]]],
    ) -> list[list[float]]:
        """Importance of each position, for every KV head of a layer."""
        method, length, kv_heads = self.method, attention.shape[-1], len(values)
        if method.name == "sparsight":
            return sparsight_scores(attention, post_vision, vision, values, grids, method)
        if method.name == "streaming-llm":
            return [[float(j) for j in range(length)]] * kv_heads
        rows = list(range(length))
        if method.name == "vl-cache":
            rows = post_vision
        elif method.name == "aircache":
            scores, importance = elite_scores(attention, post_vision, vision, kv_heads, method.elite)
            self.importance.append(importance)
            return scores
        elif method.name in WINDOWED:
            rows = rows[-method.fitted_window(length) :]
        sums = column_sums(attention, rows, kv_heads)
        if method.name in ("elastic", "prefixkv") or not method.per_head:
            sums = sums.mean(0, keepdim=True).expand_as(sums)
        scores = sums.tolist()
        if method.name in WINDOWED:
            window = method.fitted_window(length)
            return [window_pooled(score, window, method.pool, method.pooling) for score in scores]
        return scores

    def layer_shares(self, gammas: list[float], scores: list[list[list[float]]], vision: list[bool]) -> list[Any]:
        method, length = self.method, len(vision)
        window = method.fitted_window(length)
        if method.name == "aircache":
            return aircache_shares(self.importance, vision, method.budget)
        if method.name == "sparsemm":
            return sparsemm_shares(method.head_scores, length, method.budget, window, method.equal)
        if method.name == "sparsight":
            return [[n / length for n in layer] for layer in counts_of_all(scores, method.budget, method.floor_of_all)]
        if method.name == "adakv":
            equal = entries_to_keep(method.budget, length)
            counts = [adakv_counts(layer, equal, window, method.floor_of_heads) for layer in scores]
            return [[count / length for count in layer] for layer in counts]
        if method.name == "vl-cache":
            return layer_shares(gammas, method.budget, method.floor, method.water_fill)
        if method.name == "pyramidkv":
            keep = method.budget * length
            budgets = pyramid_budgets(self.layers, keep, length, min(window, keep), method.steepness)
            return [budget / length for budget in budgets]
        if method.name == "prefixkv":
            # One entry in each layer stays whatever the budget.
            total = max(int(method.budget * length * self.layers), self.layers)
            budgets = prefixkv.prefixkv_budgets(np.array([layer[0] for layer in scores]), total)
            return [budget / length for budget in budgets]
        return [method.budget] * self.layers

    def reduced(
        self,
        attention: Tensor,
        keys: Tensor,
        values: Tensor,
        vision: list[bool],
        scores: list[list[float]],
        kept: list[int],
        start: int,
    ) -> list[list[Entry]]:
        """What every KV head of a layer keeps."""
        method, most = self.method, kept[0]
        weights, *states = (x.double().numpy() for x in (attention, keys, values))
        if method.name == "elastic":
            shared, *merged = elastic.elastic_prefill(weights, *states, most, min(method.protect_first, most - 1))
            positions = [shared] * len(keys)
        elif method.name == "look-m":
            recent = max(1, round(method.recent * most))
            positions = look_m.look_m_positions(weights, ~np.array(vision), most - recent, recent, len(keys))
            merged = look_m.look_m_merge(*states, positions, method.merge)
        else:
            return [self.evicted(keys[h], values[h], score, kept[h], start) for h, score in enumerate(scores)]
        merged = (torch.from_numpy(np.stack(each)).to(keys.dtype) for each in merged)
        heads = zip(positions, *merged, strict=True)
        return [[Entry(start + j, *pair) for j, *pair in zip(*head, strict=True)] for head in heads]

    def evicted(self, keys: Tensor, values: Tensor, score: list[float], kept: int, start: int) -> list[Entry]:
        """What one KV head keeps when the others are dropped."""
        method, length = self.method, len(score)
        if method.name == "streaming-llm":
            sinks = min(method.sinks, kept - 1)
            positions = sorted(set(range(sinks)) | set(range(length - kept + sinks, length)))
        elif method.name == "prefixkv":
            positions = prefixkv.prefixkv_positions(np.array(score), kept, min(1, kept - 1))
        elif method.name in WINDOWED:
            positions = sorted(best(score, list(range(length)), kept))
        else:
            positions = vl_cache_positions(score, kept, method.recent)
        return [Entry(start + j, keys[j], values[j], score[j]) for j in positions]

    def decode(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        position = key.shape[2] - 1
        group = query.shape[1] // key.shape[1]
        output = torch.empty_like(query)
        for b, row in enumerate(self.rows[module.layer_idx]):
            tokens_seen = position + 1 - self.valid[b].index(True)
            if self.method.rule == "recall":
                self.recall(module.layer_idx, b, query[b, :, 0], position, scaling)
            for h, entries in enumerate(row.heads):
                rule = self.method.rule
                allowance = row.shares[h] * tokens_seen if rule not in ("grow", "recall") else math.inf
                if rule == "fixed-point":
                    allowance = elastic.allowance(row.shares[h], tokens_seen)
                recent = max(1, round(self.method.recent * len(entries)))
                while len(entries) + 1 > allowance and rule == "heavy-hitter" and len(entries) > recent:
                    older = entries[: len(entries) - recent]
                    entries.remove(min(older, key=lambda entry: entry.score))
                while len(entries) + 1 > allowance and rule != "heavy-hitter" and len(entries) > row.fixed[h]:
                    del entries[row.fixed[h]]
                entries.append(Entry(position, key[b, h, -1], value[b, h, -1]))
                keys = torch.stack([entry.key for entry in entries]).double()
                values = torch.stack([entry.value for entry in entries]).double()
                for q in range(h * group, (h + 1) * group):
                    weights = (keys @ query[b, q, 0].double() * scaling).softmax(0)
                    output[b, q, 0] = (weights @ values).to(query.dtype)
                    for entry, weight in zip(entries, weights.tolist(), strict=True):
                        entry.score += weight / group
        return output

    def recall(self, layer: int, b: int, query: Tensor, position: int, scaling: float) -> None:
        """Every few tokens, each KV head holds the positions that rank highest by the newest token's attention."""
        length = self.keys[layer].shape[2]
        if (position - length) % self.method.every:
            return
        kv_heads = self.keys[layer].shape[1]
        own = [j for j in range(length) if self.valid[b][j]]
        grids = [[[j - own[0] for j in row] for row in grid] for grid in self.grids[b]] if self.grids else []
        for h, entries in enumerate(self.rows[layer][b].heads):
            keys, values = self.keys[layer][b, h, own], self.values[layer][b, h, own]
            heads = query.unflatten(0, (kv_heads, -1))[h].double()
            weights = [(keys.double() @ each * scaling).softmax(0) for each in heads]
            score = grid_pooled(torch.stack(weights).mean(0).tolist(), grids, *self.method.window_of_recall)
            score = [
                each + self.method.prior * before for each, before in zip(score, self.scores[b][layer][h], strict=True)
            ]
            kept = len([entry for entry in entries if entry.position < length])
            places = vl_cache_positions(score, kept, self.method.recent)
            entries[:kept] = [Entry(own[j], keys[j], values[j]) for j in places]

    def positions(self, layer: int, b: int, h: int) -> list[int]:
        return [entry.position for entry in self.rows[layer][b].heads[h]]


def visibility(valid: list[list[bool]], length: int, blocks: list[list[int]] | None = None) -> Tensor:
    """Bool ``[B, 1, T, T]``: key ``j`` is valid, and not later than query ``i`` or in its block."""
    seen = torch.zeros(len(valid), 1, length, length, dtype=torch.bool)
    for b, row in enumerate(valid):
        for i in range(length):
            for j in range(length):
                together = blocks is not None and blocks[b][i] == blocks[b][j] != -1
                seen[b, 0, i, j] = row[j] and (j <= i or together)
    return seen


def full_attention(
    query: Tensor, key: Tensor, valid: list[list[bool]], scaling: float, blocks: list[list[int]] | None = None
) -> Tensor:
    """Post-softmax attention ``[B, H, T, T]`` in float32."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.float() @ key.float().mT * scaling
    return logits.masked_fill(~visibility(valid, query.shape[2], blocks), -math.inf).softmax(-1)


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
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    method: Method,
    tokens: int,
    vision: Tensor,
    blocks: list[list[int]] | None = None,
    grids: list[list[list[list[int]]]] | None = None,
) -> tuple[Twin, Any]:
    """Greedy generation under a method by brute force: the twin, and ``generate``'s output with its scores."""
    twin = Twin(method, vision.tolist(), inputs["attention_mask"].bool().tolist(), blocks, grids)
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
