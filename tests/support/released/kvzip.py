"""KVzip (arXiv 2505.23416)."""

import numpy as np


def kvzip_chunks(first, length, size=2000):
    """Chunks `(start, end)` of the positions from `first`, the end of the system prompt, to `length`.

    Paper (section 3.4): chunks of 2,000 tokens.

    Released (snu-mllab/KVzip, `model/wrapper.py`, `chunk_fn`, `self_task`): the last chunk is what remains. Each chunk
    is replayed, in a pass of its own over the full cache, as prompt, chat suffix, chunk. The prompt is two line breaks
    and "Repeat the previous context exactly."; for a later chunk "Repeat the part of the previous context exactly,
    starting with " and the last 8 tokens of the chunk before. NVIDIA/kvpress (`kvzip_press.py`): 2,048 tokens, no
    space at the end of the second prompt. Neither replays pictures.
    """
    return [(start, min(start + size, length)) for start in range(first, length, size)]


def kvzip_chunk_scores(queries, keys, replay_keys, start, end, sinks):
    """Scores `[H_kv, end - start]` of one chunk.

    `queries` `[H, n, d]` and `replay_keys` `[H_kv, n, d]` belong to the replayed tokens, prompt and chat suffix
    included, `keys` `[H_kv, T, d]` to the cache; all carry their rotary positions, those of the replay from `T` on.

    Paper, eq. 2: the largest attention that a key receives from any replayed query of any query head of its group, the
    softmax running over cache and replay. With chunks (section 3.4, figure 7) the softmax runs over the keys of the
    chunk and of the replay only.

    Released (`attention/score.py`, `KVScore._get_score`): over the first `sinks` keys too. `sinks` is the length of
    the system prompt (`kvcache.py`, `self.sink = self.start_idx`); in kvpress it is at most 4. A replayed query
    attends to the replay up to itself and to the full chunk. The prompt's queries count towards the maximum.
    """
    group = queries.shape[0] // keys.shape[0]
    scores = np.zeros((keys.shape[0], end - start))
    for head, per_query in enumerate(queries):
        kv_head = head // group
        cached = np.concatenate([keys[kv_head, :sinks], keys[kv_head, start:end]])
        for i, query in enumerate(per_query):
            attended = np.concatenate([cached, replay_keys[kv_head, : i + 1]])
            logits = attended @ query / np.sqrt(len(query))
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            scores[kv_head] = np.maximum(scores[kv_head], weights[sinks : sinks + end - start])
    return scores


def kvzip_scores(replays, keys, first, sinks=None):
    """Scores `[H_kv, T]` of one layer; `replays` lists (`start`, `end`, `queries`, `replay_keys`) of every chunk.

    The positions before `first` score infinity: the authors' code never evicts the system prompt. kvpress scores the
    first 4 positions 1 and the rest of what the chat template puts before the context 0, so that it goes first.
    `sinks` is `first` by default, as the authors have it. Positions that no chunk covers, such as a question that
    was part of the prompt, score infinity too; the sources know no such prompt.
    """
    scores = np.full(keys.shape[:2], np.inf)
    for start, end, queries, replay_keys in replays:
        arguments = (queries, keys, replay_keys, start, end, first if sinks is None else sinks)
        scores[:, start:end] = kvzip_chunk_scores(*arguments)
    return scores


def kvzip_positions(scores, ratio):
    """Positions kept `[L][H_kv]` from `scores` `[L, H_kv, T]`; all heads of all layers compete.

    Paper: the pairs with the lowest scores are evicted; `ratio` is the part of the context's pairs that stays, and
    what scores infinity stays on top of it.

    Released (`KVScore._threshold`): of `N` scores, those stay that exceed the one at index `int(N * ratio) - 1` of the
    descending order (the first where that is negative), so `int(N * ratio) - 1` stay and ties at the threshold all go.
    `_threshold_uniform` gives every head its `int(n * ratio)` best instead. kvpress drops the
    `int(N * (1 - ratio))` lowest, the system prompt's among the `N`.
    """
    context = np.sort(scores[np.isfinite(scores)])[::-1]
    threshold = context[max(int(len(context) * ratio) - 1, 0)] if ratio < 1 else -np.inf
    return [[np.flatnonzero(head > threshold).tolist() for head in layer] for layer in scores]
