"""LOOK-M (arXiv 2406.18139)."""

import numpy as np

from tests.support.released.common import average_groups, largest


def look_m_positions(attention, text, heavy, recent, kv_heads, cap_text=True):
    """Positions kept by each KV head; `text` `[T]` is true where the token is not part of an image.

    Paper, eq. 4 to 8: scores accumulate over the queries of the prompt, the largest score is added to every text
    token's (so that text ranks before images), the last `recent` tokens stay and of the rest the `heavy` best. The
    size is `heavy + recent`; both are 10 % of the prompt.

    Released (SUSTechBruce/LOOK-M, `LLaVA-mix_merge_v1/llava/model/kv_token_merge/modify_llama.py`,
    `TextPivotMerge_LayerWise`): 65516 is subtracted from image scores and an entry stays when its score is not
    negative afterwards, so *all* text stays even where it exceeds `heavy`; `cap_text=False`. In half precision the
    subtraction leaves steps of 32, so image scores tie. Sizes are `int(ratio * T)` each. An image is 576 tokens.
    Grouped queries are not supported; the average is ours.
    """
    scores = average_groups(attention.sum(1), kv_heads)
    before = scores.shape[1] - recent
    kept = []
    for head in scores:
        ranked = np.where(text, head + head.max(), head)[:before]
        chosen = set(largest(ranked, heavy))
        if not cap_text:
            chosen |= {j for j in range(before) if text[j]}
        kept.append([*sorted(chosen), *range(before, len(head))])
    return kept


def look_m_merge(keys, values, positions, merge="pivotal", filtered=False):
    """Keys and values of each KV head, lists of `[kept, d]`, after the merge; `keys` and `values` are `[H_kv, T, d]`.

    Paper, section 3.3: every evicted entry `e` goes to the kept entry `c` with the most similar key (cosine; values
    follow the keys' choice and weights). With `n` entries going to `c`, for keys and values alike: averaged (eq. 10)
    `(c + sum e) / (n + 1)`; pivotal (eq. 11) `(c + sum (e + c) / 2) / (n + 1)`; weighted (eq. 12)
    `(c + sum s e) / (n + 1)`, `s` the similarity. `c` on the right is the entry before any merge. Default: pivotal
    (section 5.1).

    Released (`TextPivotMerge_LayerWise`, `TextWeightedMerge_LayerWise`, `TextAVGMergeKVCache_LayerWise`): pivotal is
    eq. 11. Weighted is eq. 12 over part of what is evicted (`filtered=True`): the `i`-th evicted entry of every head
    merges when its largest similarity, averaged over the heads, is at least the mean of all; the others are lost.
    Averaged computes the same filter but applies it to the targets only, so entries and targets fall out of step; it
    equals eq. 10 only where the filter passes everything. Heads need equally many entries for the filter.
    """
    length = keys.shape[1]
    evicted = [[j for j in range(length) if j not in kept] for kept in positions]
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    targets, similarities = [], []
    for head, (kept, gone) in enumerate(zip(positions, evicted, strict=True)):
        cosine = [[unit[head, e] @ unit[head, c] for c in kept] for e in gone]
        targets.append([int(np.argmax(row)) for row in cosine])
        similarities.append([max(row) for row in cosine])
    merges = [[True] * len(gone) for gone in evicted]
    if filtered:
        merges = [np.mean(similarities, 0) >= np.mean(similarities)] * len(positions)

    merged = []
    for states in (keys, values):
        heads = []
        for head, kept in enumerate(positions):
            original = states[head, kept]
            total, count = original.copy(), np.ones(len(kept))
            for i, e in enumerate(evicted[head]):
                if not merges[head][i]:
                    continue
                c = targets[head][i]
                weight = similarities[head][i] if merge == "weighted" else 1.0
                addend = (states[head, e] + original[c]) / 2 if merge == "pivotal" else weight * states[head, e]
                total[c] += addend
                count[c] += 1
            heads.append(total / count[:, None])
        merged.append(heads)
    return merged
