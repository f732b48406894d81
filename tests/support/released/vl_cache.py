"""VL-Cache (arXiv 2410.23317): from the paper alone; no released code was found."""

import numpy as np

from tests.support.released.common import average_groups, largest


def vl_cache_sparsity(attention, queries, threshold=0.01):
    """Share of the causally visible weights of the last `queries` rows that the filter zeroes, averaged over heads.

    Eq. 1 to 3: a weight survives when it is at least `threshold` times the largest of its row.
    """
    length = attention.shape[-1]
    shares = []
    for head in attention:
        zeroed = visible = 0
        for i in range(length - queries, length):
            row = head[i, : i + 1]
            zeroed += int(np.sum(row < threshold * row.max()))
            visible += i + 1
        shares.append(zeroed / visible)
    return float(np.mean(shares))


def vl_cache_budgets(sparsities, alpha, length):
    """Entries of each layer by the paper's plain clip: `clip((1 - g_l) / sum (1 - g) * alpha * L, 0.01, 1) * T`.

    Rounded, at least 1. The total may miss `alpha * L * T` where a layer is clipped; the paper leaves it at that.
    """
    density = 1 - np.asarray(sparsities)
    shares = np.clip(density / density.sum() * alpha * len(density), 0.01, 1.0)
    return [max(1, round(float(share) * length)) for share in shares]


def vl_cache_positions(attention, keep, queries, kv_heads, recent=0.1):
    """Positions kept by each KV head: the most recent tenth of `keep`, then the highest post-vision scores."""
    scores = average_groups(attention[:, -queries:].sum(1), kv_heads)
    newest = max(1, round(recent * keep))
    before = scores.shape[1] - newest
    return [[*largest(head[:before], keep - newest), *range(before, scores.shape[1])] for head in scores]
