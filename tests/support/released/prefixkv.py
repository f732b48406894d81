"""PrefixKV (arXiv 2412.03409)."""

import numpy as np

from tests.support.released.common import largest


def prefix_lengths(scores, threshold):
    """Smallest number of entries, highest first, whose share of a layer's score reaches `threshold`; `scores` `[L, T]`.

    Scores are attention summed over the queries and averaged over the heads of a layer (`prefixkv.py`,
    `PrefixKV.__call__`).
    """
    lengths = []
    for layer in scores:
        mass = np.cumsum(np.sort(layer)[::-1] / layer.sum())
        lengths.append(int(np.sum(mass < threshold)) + 1)
    return [min(n, scores.shape[1]) for n in lengths]


def prefixkv_budgets(scores, total):
    """Entries of each layer by the paper: the highest shared threshold whose prefixes hold at most `total` entries.

    Paper: one cumulative priority for all layers, found by binary search so that the mean retained fraction is the
    budget. Here every cumulative share that occurs is tried, so the threshold is exact.
    """
    shares = [np.cumsum(np.sort(layer)[::-1] / layer.sum()) for layer in scores]
    fitting = [p for p in np.concatenate(shares) if sum(prefix_lengths(scores, p)) <= total]
    return prefix_lengths(scores, max(fitting))


def prefixkv_profile(scores, drop_ratio, protected=2):
    """Entries of each layer by the released profile, protected ones included.

    Released (THU-MIG/PrefixKV, `prefixkv.py`, `obtain_cdf_num` and `PrefixKV.__call__` with `profile`): the layer's
    forget count is `T - prefix length - protected`, at least 0; bisection over the threshold stops when their sum is
    within 5 of `drop_ratio * L * T`; the counts are then scaled to that sum and rounded down.

    Offline use: the ratios `forget / T` of many prompts are averaged into a file; a prompt then forgets
    `round(ratio * T)`.
    """
    length = scores.shape[1]
    target, low, high = drop_ratio * scores.size, 0.0, 1.0
    while True:
        middle = (low + high) / 2
        forget = np.maximum(length - np.array(prefix_lengths(scores, middle)) - protected, 0)
        if abs(forget.sum() - target) < 5:
            break
        low, high = (low, middle) if forget.sum() < target else (middle, high)
    return [length - int(f * target / forget.sum()) for f in forget]


def prefixkv_positions(scores, keep, protect_first=1):
    """Positions of one layer, shared by its heads: the first, the last and the `keep - 2` best between; `scores` `[T]`.

    Released (`PrefixKV.__call__`): `start_size` 1 and `protect_size` 1; no recent share.
    """
    last = len(scores) - 1
    between = largest(scores[protect_first:last], keep - protect_first - 1)
    return [*range(protect_first), *(protect_first + j for j in between), last]


def prefixkv_point(kept, distance=25):
    """Index of the entry that leaves in decoding (`drop_at_point` and `allowance` in `elastic.py`, per layer).

    Released (`selected_idxs`): `kept - 25`; where that is below 1, the middle, `kept // 2`. So the entries before the
    point stay for good; those behind it leave oldest first, the last prompt token among them after 25 drops: its
    protection is one of the prompt's selection only. The allowance of a layer is its own retained fraction of the
    tokens seen. Paper: decoding prunes so that the layers keep their fractions.
    """
    return kept - distance if kept - distance >= 1 else kept // 2
