"""InfiniPot-V (arXiv 2506.15745); the paper's equations as published summaries give them.

`keys` and `values` are those of the vision tokens alone, `[H_kv, f * p, d]`: `f` frames of `p` tokens each, in order.
The keys carry their rotary position. Released: aiha-lab/InfiniPot-V, `kvcache_utils.py`, `process_kv_cache`; its README
calls it a re-implementation that does not have everything of the paper.
"""

import numpy as np

from tests.support.released.common import largest


def temporal_redundancy_scores(keys, frame, recent):
    """TaR score `[H_kv, (f - recent) * p]` of the tokens of all but the last `recent` frames.

    Paper, eq. 4: minus the mean, over the recent frames, of the cosine between the key and the key at the same place
    of that frame. Released: the same (1e-9 is added to the norms); scores are one per KV head.
    """
    scores = []
    for head in keys:
        unit = (head / np.linalg.norm(head, axis=-1, keepdims=True)).reshape(-1, frame, head.shape[-1])
        past, latest = unit[: len(unit) - recent], unit[len(unit) - recent :]
        scores.append([-np.mean([key @ other[j] for other in latest]) for each in past for j, key in enumerate(each)])
    return np.array(scores)


def value_norms(values, grid=None, kernel=1, axes=2):
    """VaN score `[H_kv, f * p]`: the norm of the value, averaged over its neighbours.

    Paper, section 3.2: average pooling with a kernel of 7, 5, 3 or 1, the smaller the more the norms of a layer vary
    (coefficient of variation). Its function from the variation to the kernel could not be read.

    Released: off by default and in the published script. With `adaptive_pooling` the kernel follows the layer's depth:
    the first quarter of the layers 7 over frames, height and width (`axes=3`), the second 5 over height and width
    (`axes=2`), the third 3 along the sequence (`axes=1`), the last none; the kernel is at most the smallest of frames,
    height and width, made odd. Padding counts as zeros. `grid` is (height, width) of a frame.
    """
    norms = np.array([[np.linalg.norm(value) for value in head] for head in values])
    if kernel == 1:
        return norms
    half, pooled = kernel // 2, []
    for head in norms:
        volume = head.reshape(1, 1, -1) if axes == 1 else head.reshape(-1, *grid)
        means = np.empty(volume.shape)
        for t, y, x in np.ndindex(volume.shape):
            frames = slice(max(0, t - half), t + half + 1) if axes == 3 else slice(t, t + 1)
            lines = slice(max(0, y - half), y + half + 1) if axes > 1 else slice(y, y + 1)
            near = volume[frames, lines, max(0, x - half) : x + half + 1]
            means[t, y, x] = near.sum() / kernel**axes
        pooled.append(means.ravel())
    return np.array(pooled)


def infinipot_v(keys, values, frame, budget, alpha=0.5, recent_ratio=0.25, grid=None, kernel=1, axes=2):
    """Vision positions kept by each KV head, counted from the first vision token; `budget` of them.

    Paper, algorithm 1 and section 3.3: whenever the cache is full, the `r` most recent frames stay, the TaR scores
    choose `alpha * budget - r p` of the other tokens, and the value norms choose the remaining `(1 - alpha) * budget`.

    Released: once the frames exceed `budget / p` (an integer there), after each block of the video but
    the last; here it is one such compression. `r = int(recent_ratio * f)`, with `alpha` 0.5 and `recent_ratio` 0.25;
    the part of the norms is `round((1 - alpha) * budget)`, halves to even; the norms choose among what TaR left, so
    that exactly `budget` stay. Fewer than 4 frames, or recent frames that exceed the part of TaR, are errors there;
    here at least 1 frame is recent, and of too many recent tokens the last stay.

    System prompt and question are no part of it: they stay. Neither source says what becomes of text between frames.
    """
    frames = keys.shape[1] // frame
    if frames * frame <= budget:
        return [list(range(frames * frame))] * keys.shape[0]
    recent = max(1, int(recent_ratio * frames))
    temporal = budget - round((1 - alpha) * budget)
    redundancy = temporal_redundancy_scores(keys, frame, recent)
    norms = value_norms(values, grid, kernel, axes)
    kept = []
    for head in range(keys.shape[0]):
        latest = list(range(frames * frame - min(recent * frame, temporal), frames * frame))
        first = {*latest, *largest(redundancy[head], temporal - len(latest))}
        others = [j for j in range(frames * frame) if j not in first]
        chosen = largest(norms[head][others], budget - len(first))
        kept.append(sorted([*first, *(others[i] for i in chosen)]))
    return kept
