"""MixKV (arXiv 2510.20707); the paper's equations as published summaries give them."""

import numpy as np

from tests.support.released.common import causal_attention, window_scores, with_window


def mixkv_redundancy(keys):
    """Redundancy of each KV head `[H_kv]`: mean cosine of two different keys of the prompt; `keys` `[H_kv, T, d]`.

    Paper: the mean off-diagonal similarity, in closed form `(T |m|^2 - 1) / (T - 1)` with `m` the mean unit key.

    Released (xuyang-liu16/MixKV, `mixkv/mixkv_utils.py`, `calcul_similarity_score`): the closed form over *all* keys,
    the observation window included. The published scripts do not use it: `head_score` is read from a file of
    averages for a Qwen model of 28 layers with 4 KV heads (`load_similarity_score`), whatever the model, and the line
    that takes the value of the prompt is commented out. The GUI repository (sakura-gui/GUI-grounding-MixKV,
    `UI-Venus/sparsemm/sparsemm_utils.py`) takes the value of the prompt. This function follows the paper. Keys carry
    their rotary position. The value may be slightly negative; neither source clips it.
    """
    redundancy = []
    for head in keys:
        unit = [key / np.linalg.norm(key) for key in head]
        cosines = [a @ b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
        redundancy.append(np.mean(cosines))
    return np.array(redundancy)


def brought_to(values, mean):
    """`values` `[n]` moved to the range from 0 to 1, then multiplied so that their mean is `mean`.

    Released: 1e-8 is added to the range (of the keys' term only) and to the mean. Equal values give 0 for the keys'
    term and NaN for the values' norm there, 0 here.
    """
    span = values.max() - values.min()
    if span == 0:
        return np.zeros(len(values))
    share = (values - values.min()) / span
    return share * mean / share.mean()


def mixkv_scores(scores, keys, values, redundancy=None):
    """Scores `[H_kv, n]` of the first `n` positions, from any importance `scores` `[H_kv, n]` of them.

    `keys` and `values` are `[H_kv, T, d]`, `n <= T`. `redundancy` `[H_kv]` is that of the prompt by default.

    Paper: importance = given score + norm of the value; diversity = minus the cosine with the mean unit key, here
    `-k^ . m` with `m` not normalised, which the scaling makes the same; result `(1 - r) importance + r diversity`.
    Norm and diversity are scaled to 0 to 1 and then to the mean of the given score.

    Released (`SnapKVCluster.update_kv`, `AdaKVCluster.update_kv`, `MixedSparseMM.update_kv` with
    `select_method=headwisemixkv`): the same. `m` is the mean over all `T` keys (a comment there says otherwise); the
    minimum, maximum and means are taken over the `n` positions before the window, which alone are ranked. The given
    score is the pooled window attention, averaged over the queries of a group, so every statistic is one per KV head.
    AdaKV's and SparseMM's budgets of the heads come from the given score, not from this one.

    Not said by either: which positions to scale over where a score has no window. Then `n = T` here.
    """
    if redundancy is None:
        redundancy = mixkv_redundancy(keys)
    mixed = []
    for given, head_keys, head_values, r in zip(scores, keys, values, redundancy, strict=True):
        unit = np.array([key / np.linalg.norm(key) for key in head_keys])
        mean_key = unit.mean(0)
        diversity = np.array([-unit[j] @ mean_key for j in range(len(given))])
        norm = np.array([np.linalg.norm(head_values[j]) for j in range(len(given))])
        importance = given + brought_to(norm, given.mean())
        mixed.append((1 - r) * importance + r * brought_to(diversity, given.mean()))
    return np.array(mixed)


def mixkv(queries, keys, values, keep, window=32, kernel=5, pooling="average", redundancy=None):
    """Positions kept by each KV head, around SnapKV's scores; `queries` are `[H, T, d]`.

    Released (`init_snapkv`): window 32, kernel 5, average pooling; a prompt shorter than `keep` is kept in full.
    """
    if keys.shape[1] < keep:
        return [list(range(keys.shape[1]))] * len(keys)
    scores = window_scores(causal_attention(queries, keys), window, kernel, pooling, len(keys)) / window
    return [with_window(head, keep - window, window) for head in mixkv_scores(scores, keys, values, redundancy)]
