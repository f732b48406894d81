"""Expected Attention (arXiv 2510.00636); of the paper only the abstract and published reviews were at hand."""

import numpy as np


def average_rotation(frequencies, first, count):
    """Mean `[d, d]` of the rotary matrices at `count` positions from `first` on; `frequencies` is `[d / 2]`.

    Dimension `i` turns together with `i + d / 2`, as in transformers' `rotate_half`. The attention factor of a scaled
    rotary embedding is taken as 1.
    """
    half = len(frequencies)
    total = np.zeros((2 * half, 2 * half))
    for position in range(first, first + count):
        for i, frequency in enumerate(frequencies):
            cosine, sine = np.cos(position * frequency), np.sin(position * frequency)
            total[i, i] += cosine
            total[i + half, i + half] += cosine
            total[i, i + half] -= sine
            total[i + half, i] += sine
    return total / count


def expected_attention_scores(
    queries, keys, values, frequencies, next_position=None, future=512, sinks=4, epsilon=0.0, covariance=True
):
    """Scores `[H_kv, T]`; `queries` `[H, T, d]` before rotary embedding (after any query norm), `keys` `[H_kv, T, d]`
    after it, `values` `[H_kv, T, d]`, `frequencies` `[d / 2]`. The first `sinks` score infinity.

    Paper: queries are taken as Gaussian, so the expected attention of a key has a closed form,
    `exp(k . mu / sqrt(d) + k' S k / (2 d))` before it is normalised; mean and covariance are rotated by a rotary matrix
    averaged over the next 512 positions; the effect on the residual stream ranks the pairs.

    Released (NVIDIA/kvpress, `kvpress/presses/expected_attention_press.py`, `ExpectedAttentionPress`), all followed:

    - mean and covariance (dividing by the number of queries) are those of the prompt's queries *after* the first
      `sinks`, and the softmax runs over the keys after them;
    - the matrices are averaged first, then applied once: `R mu` and `R S R'`;
    - the positions are the 512 from `T` on, `T` counting the sinks;
    - one softmax per query head; then the mean over the query heads of a group; then `(mean + epsilon) |v|`. The
      default `epsilon` is 0; the evaluation registry uses 1e-2 (with AdaKV);
    - the norm is that of the value itself; the paper argues with the effect on the residual stream, where the value
      has been through the output projection;
    - sinks score (largest of all scores) + 1.

    Neither says anything on multimodal rotary embedding. Text that follows the prompt has the same position on all
    three axes, so its rotation is the ordinary one, but its position is `next_position` = the largest position of the
    prompt + 1, which is less than `T` after a picture. Default: `T`, as released.
    """
    heads, length, size = queries.shape
    group = heads // keys.shape[0]
    rotation = average_rotation(frequencies, length if next_position is None else next_position, future)
    scores = np.full((keys.shape[0], length), np.inf)
    for kv_head in range(keys.shape[0]):
        later = keys[kv_head, sinks:]
        expected = []
        for head in range(kv_head * group, (kv_head + 1) * group):
            observed = queries[head, sinks:]
            mean = observed.mean(0)
            spread = sum(np.outer(q - mean, q - mean) for q in observed) / len(observed)
            mean, spread = rotation @ mean, rotation @ spread @ rotation.T
            logits = np.array([k @ mean / np.sqrt(size) + covariance * (k @ spread @ k) / (2 * size) for k in later])
            weights = np.exp(logits - logits.max())
            expected.append(weights / weights.sum())
        for j, weight in enumerate(np.mean(expected, 0)):
            scores[kv_head, sinks + j] = (weight + epsilon) * np.linalg.norm(values[kv_head, sinks + j])
    return scores
