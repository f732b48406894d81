"""SparseMM (arXiv 2506.05344)."""

import numpy as np

from tests.support.released.common import window_scores, with_window


def visual_scores(images):
    """Score of every head `[L, H]` from transcripts; `images` lists the transcribed tokens of each image.

    A token is a pair (`rows` `[L, H, T]`, `region`): `rows` is the attention of the query that produced it, `region`
    the positions of the image tokens where its text stands.

    Paper, section 3.2: a head scores `1 / |region|` for each token whose region holds the argmax of the head's
    attention, averaged over the tokens.

    Released (CR400AF-A/SparseMM, `visual_head/llava_visual_head.py` and `qwen_visual_head.py`, `hit_score`,
    `decode`): the argmax is over all keys, text included; summed over the tokens of an image, then
    (`sparsemm_utils.py`, `SparseMM.__init__`) averaged over the images; both give the same shares up to the weight of
    long transcripts. 1,000 images of synthdog-en-detection, "Provide all the OCR results of this image.", greedy, at
    most 1,024 tokens of the model's own answer; a token counts only when its text is a substring of exactly one
    annotated chunk; the region is every patch that the chunk's box touches.
    """
    totals = []
    for candidates in images:
        total = 0.0
        for rows, region in candidates:
            total = total + np.isin(rows.argmax(-1), region) / len(region)
        totals.append(total)
    return np.mean(totals, 0)


def sparsemm_budgets(head_scores, keep, kv_heads, window=32, ratio=0.1):
    """Entries of every KV head `[L, H_kv]`, the window included, from `head_scores` `[L, H]`.

    Paper, section 3.3: every head has the local window; of the remaining budget a part `ratio` is shared uniformly;
    the rest follows the scores. Window 32, ratio 0.1.

    Released (`sparsemm/sparsemm_utils.py`, `SparseMM.__init__`): `base = keep - window`, `least = int(base * ratio)`,
    `rest = (base - least) * L * H_kv`, head budget `round(share * rest + least)`, halves to even, `share` its part of
    the sum of all scores. Grouped queries: the shares of a group are *summed* (averaging gives the same after
    normalisation). A head's budget beyond the prompt is cut there; what is cut is not handed to other heads
    (`update_kv`).
    """
    layers = head_scores.shape[0]
    shares = (head_scores / head_scores.sum()).reshape(layers, kv_heads, -1).sum(-1)
    base = keep - window
    least = int(base * ratio)
    rest = (base - least) * layers * kv_heads
    return np.rint(shares * rest + least).astype(int) + window


def sparsemm_positions(attention, budgets, keep, window=32, kernel=5, pooling="average"):
    """Positions kept by each KV head of one layer; `budgets` `[H_kv]` include the window.

    Released (`SparseMM.update_kv`, `init_sparsemm`): SnapKV's scores, averaged over a group before pooling, kernel 5,
    average pooling; nothing is dropped when `keep` (the uniform share) exceeds the prompt.
    """
    length = attention.shape[-1]
    if keep > length:
        return [list(range(length))] * len(budgets)
    scores = window_scores(attention, window, kernel, pooling, len(budgets))
    return [with_window(s, min(int(b), length) - window, window) for s, b in zip(scores, budgets, strict=True)]
