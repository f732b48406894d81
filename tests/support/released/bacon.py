"""BACON (arXiv 2606.14782)."""

import numpy as np

from tests.support.released.common import average_groups, pool, window_scores


def bacon_inputs(attention, window, kernel, kind, kv_heads):
    """Window scores `B` and last-query scores `Q`, both `[H_kv, T - window]`, of one layer's attention `[H, T, T]`.

    Project page: `B` is the average attention of the last queries, `Q` the attention of the last query alone.

    Released (ryu1ion/official_BACON, `bacon/bacon_utils.py`, `SnapKVCluster.update_kv`, `_bacon_q_pooled`): both are
    averaged over the queries of a group, then pooled alike. `B` is a *mean* over the window; with a sum `Q - B` would
    hardly ever be positive. The last query is one of the window's. Window 32, kernel 5, average pooling as MixKV's.
    """
    base = window_scores(attention, window, kernel, kind, kv_heads) / window
    last = average_groups(attention[:, -1, :-window], kv_heads)
    return base, np.array([pool(head, kernel, kind) for head in last])


def bacon_scores(base, last, capacity, strength=0.5, kernel=5, layers=4):
    """Calibrated scores `[L, H_kv, n]` from `base` and `last` `[L, H_kv, n]` of all layers.

    `capacity` is the number of entries that a KV head keeps before the window, one number or one for each layer.

    Released (`compute_bacon_score`, its default mode `elt`), per layer and KV head:

    - evidence `E = max(Q - B, 0)`;
    - `V = E + (E averaged over 5 neighbours) + (E averaged over up to 4 layers before this one)`. The neighbours'
      average divides by 5 at the edges too. The first layer has no third term, the second has that of one layer. The
      layers' term is the mean of `E`, not of `V`, and goes KV head by KV head;
    - the `min(2 * capacity, n)` largest values of `B`, and separately of `V`, give standard deviations (dividing by
      their number) and means;
    - `S = B + lambda V`, `lambda = 0.5 sd(B) / sd(V) * clamp(mean(V) / mean(B), 0, 1)`.

    1e-8 is added to both denominators. The last factor exists in this mode only; a comment says that it came after the
    others.

    `capacity` excludes the window (`max_capacity_prompt - window_size`). For AdaKV and SparseMM it is the uniform
    share, not that of the head, and the heads' budgets come from `B`. PyramidKV passes the layer's own. Layers of
    other shapes are left out of the third term; here all layers have one.

    Paper: evidence, intra-layer coherence, inter-layer persistence, and a strength that matches variances. Only its
    abstract and summaries were at hand, so this function follows the code.
    """
    capacities = np.broadcast_to(capacity, len(base))
    evidence = np.maximum(last - base, 0)
    scores = np.empty_like(base)
    for layer in range(len(base)):
        for head in range(base.shape[1]):
            own = evidence[layer, head]
            total = own + pool(own, kernel, "average")
            before = range(max(0, layer - layers), layer)
            if before:
                total = total + np.mean([evidence[j, head] for j in before], 0)
            count = max(1, min(2 * int(capacities[layer]), len(own)))
            high_base = np.sort(base[layer, head])[::-1][:count]
            high_total = np.sort(total)[::-1][:count]
            presence = min(max(high_total.mean() / (high_base.mean() + 1e-8), 0.0), 1.0)
            weight = strength * high_base.std() / (high_total.std() + 1e-8) * presence
            scores[layer, head] = base[layer, head] + weight * total
    return scores
