"""AdaKV (arXiv 2407.11550)."""

import numpy as np

from tests.support.released.common import largest, window_scores, with_window


def adakv_budgets(scores, base, floor=0.2, normalize=False):
    """Entries that each head keeps before the window; `scores` `[H, n]` are pooled, `base` is the uniform share.

    Paper, algorithms 1 and 2: `n_h` counts the entries of head `h` among the `H * base` highest scores of all heads;
    the safeguard mixes it with the uniform share, `alpha * n_h + (1 - alpha) * base`. (It pools each query's row and
    then averages over the window; the released code averages first.)

    Released (FFY0/AdaKV, `adaptive_snapkv/monkeypatch/snapkv_utils.py`, `AdaptiveSnapKVCluster.update_kv_gqa`):
    `round((1 - floor) * n_h + int(floor * base))`, halves to even. Every head may win the top-k, and the floor is
    mixed in after it: it is not a reserved part followed by a top-k over the rest. Rounding may move the total by a
    few entries. `floor` is therefore the paper's `1 - alpha`. Default 0.2 (`experiments/LongBench/pred.py`;
    `config_compress` says 0.5).

    `normalize` multiplies the scores of a head by (sum of its `base` highest scores) / (sum of all its scores) before
    the top-k over the heads; the order within a head stays. The paper does not have it; the authors leave it off, the
    copy in KVCache-Factory (`init_adakv`) switches it on.
    """
    heads, length = scores.shape
    if normalize:
        ordered = np.sort(scores, axis=1)[:, ::-1]
        scores = scores * (ordered[:, :base].sum(1) / ordered.sum(1))[:, None]
    wins = [sum(index // length == head for index in largest(scores.ravel(), heads * base)) for head in range(heads)]
    return [int(np.rint((1 - floor) * n + int(base * floor))) for n in wins]


def adakv(attention, keep, kv_heads, window=32, kernel=7, pooling="max", floor=0.2, normalize=False):
    """Positions kept by each KV head: SnapKV's scores, `adakv_budgets` for the numbers, the window on top of them.

    Released (`AdaptiveSnapKVCluster`): window 32, kernel 7, max pooling; a prompt whose part before the window is
    shorter than `keep - window` is kept in full. With `gqa_support` the queries of a group are averaged (or
    maximised) before pooling.
    """
    length = attention.shape[-1]
    if keep - window > length - window:
        return [list(range(length))] * kv_heads
    scores = window_scores(attention, window, kernel, pooling, kv_heads) / window
    budgets = adakv_budgets(scores, keep - window, floor, normalize)
    return [with_window(head, budget, window) for head, budget in zip(scores, budgets, strict=True)]
