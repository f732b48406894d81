"""What several methods share: attention weights, grouped-query averages, pooling, and the choice of the largest."""

import numpy as np


def causal_attention(queries, keys):
    """Weights `[H, T, T]` of queries `[H, T, d]` and keys `[H_kv, T, d]`; consecutive query heads share a KV head."""
    heads, length, size = queries.shape
    keys = np.repeat(keys, heads // keys.shape[0], axis=0)
    logits = queries @ keys.transpose(0, 2, 1) / np.sqrt(size)
    logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def average_groups(scores, kv_heads):
    """Mean over the query heads that share a KV head: `[H, ...]` becomes `[H_kv, ...]`."""
    return scores.reshape(kv_heads, scores.shape[0] // kv_heads, *scores.shape[1:]).mean(1)


def pool(scores, kernel, kind):
    """Pool `[n]` with an odd kernel and stride 1, as `F.max_pool1d` and `F.avg_pool1d` with padding `kernel // 2` do.

    The average divides by the kernel at the edges too: the padding counts as zeros.
    """
    half, pooled = kernel // 2, []
    for j in range(len(scores)):
        near = scores[max(0, j - half) : j + half + 1]
        pooled.append(near.max() if kind == "max" else near.sum() / kernel)
    return np.array(pooled)


def largest(scores, count):
    """Sorted positions of the `count` largest scores; of equal scores the later position wins.

    The papers do not name a rule for ties, and `torch.topk` in the released code promises none.
    """
    order = sorted(range(len(scores)), key=lambda j: (scores[j], j), reverse=True)
    return sorted(order[:count])


def window_scores(attention, window, kernel, kind, kv_heads):
    """Pooled scores `[H_kv, T - window]`: attention of the last `window` queries, averaged over groups, then pooled.

    Only the positions before the window are pooled, so no score of the window reaches them.
    """
    mean = average_groups(attention[:, -window:, :-window].sum(1), kv_heads)
    return np.array([pool(head, kernel, kind) for head in mean])


def with_window(scores, count, window):
    """The `count` largest of the scored positions, then the `window` positions after them."""
    return largest(scores, count) + list(range(len(scores), len(scores) + window))
