"""H2O (arXiv 2306.14048)."""

import numpy as np

from tests.support.released.common import average_groups, largest


def h2o(attention, decoded, heavy, recent, kv_heads):
    """Positions held by each KV head after the prompt and after each decoded token: `[steps + 1][H_kv]`.

    `attention` `[H, T, T]` is the prompt's; `decoded[s]` `[H, entries]` is the row of step `s` over the entries held
    by then and, last, the new one.

    Paper, algorithm 1: scores accumulate over all queries, also during decoding; half of the budget is recent, half
    heavy hitters; one entry leaves at each step.

    Released (FMInference/H2O, `h2o_hf/utils_real_drop/modify_llama.py`, `H2OKVCache_LayerWise`): the row is added to
    the scores, then the `heavy` best of all but the last `recent` entries stay, and the last `recent`. Scores leave
    with their entries. Nothing leaves while at most `heavy + recent` entries are held. Both sizes are absolute
    numbers; `utils_hh` and LOOK-M take them as `int(ratio * T)` each.

    Differences: `utils_hh/modify_llama.py`, which masks instead of dropping, masks the entry `T - recent` for one
    step although it is neither weighed nor counted as recent, and lets it return. The released code has no grouped
    queries; the average over a group is KVCache-Factory's default (`pyramidkv_utils.py`, `_reduce_group_scores`).
    """
    held = [list(range(attention.shape[-1])) for _ in range(kv_heads)]
    scores = list(average_groups(attention.sum(1), kv_heads))
    history, new = [], attention.shape[-1]
    for step in range(len(decoded) + 1):
        if step > 0:
            rows = average_groups(decoded[step - 1], kv_heads)
            for head in range(kv_heads):
                held[head].append(new)
                scores[head] = np.append(scores[head], 0.0) + rows[head]
            new += 1
        for head in range(kv_heads):
            entries = len(held[head])
            if entries > heavy + recent:
                stay = largest(scores[head][: entries - recent], heavy) + list(range(entries - recent, entries))
                held[head] = [held[head][j] for j in stay]
                scores[head] = scores[head][stay]
        history.append([list(positions) for positions in held])
    return history
