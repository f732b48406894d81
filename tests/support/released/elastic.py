"""Elastic Cache (arXiv 2407.18121)."""

import math

import numpy as np

from tests.support.released.common import largest


def elastic_prefill(attention, keys, values, keep, protect_first=1):
    """Positions (one list for all heads of the layer), keys and values `[H_kv, keep, d]` after the prompt.

    Paper, section 3.3: the importance of `j` is the sum over the queries of `A[h, i, j]`, averaged over the heads of
    the layer; the most important tokens are anchors; every other token joins the bucket of the nearest anchor, of two
    equally near the earlier (eq. 2 rounds the middle down); a key or value is the mean of its bucket, anchor included
    (eq. 3). Section 4.1: the first and the most recent token are protected; eq. 2 says nothing about their buckets.

    Released (liuzuyan/ElasticCache, `kv_cache.py`, `ElasticCache.__call__`): the nearest anchor is looked for among
    the selected positions before the first and the last are appended to them, so what is dropped never merges into a
    protected entry. This function follows it: protected entries stay as they are and count towards `keep`.

    Differences of the released code, none of them followed: it compares `argsort(score)` with the number to forget,
    which is not a rank; it compares with `>`, so it keeps `T - int(ratio * T) - 1` entries; the positions that it
    drops lack the offset `start_size`, so each bucket takes the left neighbour of the token it should take. With
    `start_size` 0 and scores whose sorting permutation is its own inverse, the first and the third vanish: that is
    what the goldens use.
    """
    length = attention.shape[-1]
    middle = range(protect_first, length - 1)
    importance = attention.sum(1).mean(0)
    chosen = largest(importance[protect_first : length - 1], keep - protect_first - 1)
    anchors = [protect_first + j for j in chosen]
    positions = [*range(protect_first), *anchors, length - 1]
    buckets = {position: [position] for position in positions}
    for j in middle:
        if anchors and j not in anchors:
            buckets[min(anchors, key=lambda a: (abs(a - j), a))].append(j)
    merged = [np.stack([x[:, buckets[p]].mean(1) for p in positions], 1) for x in (keys, values)]
    return positions, *merged


def allowance(keep_ratio, seen):
    """Entries allowed after `seen` tokens by Elastic Cache and PrefixKV: `keep_ratio * seen`, rounded up.

    Released (`kv_cache.py`, `prefixkv.py`): one entry leaves when `int(entries - seen * (1 - ratio)) >= 1`, entries
    counted with the new one. Paper: it leaves unless entries / seen is lower than the ratio, which allows one entry
    less.
    """
    return math.ceil(round(keep_ratio * seen, 9))


def drop_at_point(held, allowances, new, point):
    """Ids held after each step: append the next id from `new` on; drop the entry at `point` where over the allowance.

    Paper, section 3.3: the entry at the fixed location leaves after the new one has been added. Released: the new
    token attends first, the entry leaves after the step, so a step attends to one entry more than it keeps.
    """
    history, held = [], list(held)
    for step, allowed in enumerate(allowances):
        held.append(new + step)
        if len(held) > allowed:
            del held[point]
        history.append(list(held))
    return history


def elastic_point(kept, distance=25, protect_first=1):
    """Index of the entry that leaves: `distance` before the end of the entries kept from the prompt.

    Paper, section 4.1: a recent distance of 25. Released (`selected_idx`): `T - int(ratio * T) - 25`, that is
    `kept + 1 - 25` because of the `>` above; nothing keeps it from being negative or 0. Here it is never a protected
    first entry. The entries before it stay for good, those behind it leave oldest first.
    """
    return max(kept - distance, protect_first)
