"""TGV-KV (arXiv 2606.03075); the paper's equations as published summaries give them.

`vision` `[T]` is true where the token is part of the picture. The text after the last vision token is what the paper
calls text. Released (Danielement321/TGV-KV, `kv_caches/tgv_kv.py`, `TGVKVCache`): the picture is the block from the
first image token on, as long as there are image tokens, so text between two pictures counts as vision and the end of
the last picture as text. Here text before or between pictures is text, and every vision token is vision.
"""

import numpy as np


def text_start(vision):
    """Position of the first token after the last vision token; the picture must be followed by text."""
    return int(np.flatnonzero(vision)[-1]) + 1


def tgv_kv_scores(attention, vision, above=100.0):
    """Scores `[T]` of one layer, shared by its KV heads; `attention` is `[H, T, T]`.

    Paper (text-weighted ranking) and released `_prefill`, with `A` the mean over all query heads and `N` tokens of
    text: text token `j` weighs `w_j = sum_{i >= j} A[i, j] / (N - j + 1)` over the text's queries, `j` counted from 1,
    so the mean attention from the tokens that can attend to it, itself included; a vision token scores
    `s_j = sum_i w_i A[i, j]` over the text's queries. The paper normalises `w` to a sum of 1, the code does not; the
    ranking of vision tokens is the same.

    Paper (text-prioritised retention): text is ranked by `sum_{i >= j} A[i, j]` and ranks before vision. Released: a
    text token, before or after the picture, scores the sum over *all* queries, those of the picture included, plus
    100, which ranks it first as long as no vision score exceeds 100. Text before the picture is not in the paper; its
    sums run over more queries, so it mostly outranks the question.
    """
    mean = attention.mean(0)
    length = mean.shape[0]
    start = text_start(vision)
    scores = np.empty(length)
    weights = {j: sum(mean[i, j] for i in range(j, length)) / (length - j) for j in range(start, length)}
    for j in range(length):
        if vision[j]:
            scores[j] = sum(weights[i] * mean[i, j] for i in range(start, length))
        else:
            scores[j] = sum(mean[i, j] for i in range(length)) + above
    return scores


def tgv_kv_shares(attentions, vision):
    """Share `[L]` of the total budget that each layer gets; `attentions` is `[L, H, T, T]`.

    Paper (text-vision budgeting) and released `_prefill`: the sum of `A` from the text after the picture to the
    picture, over its sum over all layers. The paper writes that block as a softmax of the text's queries and the
    picture's keys; a softmax over those keys alone would give every layer the same share.
    """
    start = text_start(vision)
    sums = []
    for attention in attentions:
        mean = attention.mean(0)
        sums.append(sum(mean[i, j] for i in range(start, len(mean)) for j in np.flatnonzero(vision)))
    return np.array(sums) / np.sum(sums)


def tgv_kv_budgets(shares, ratio, length, sinks=4):
    """Entries of each layer: `ratio * L * T * share`.

    Released: `T - round(T - ratio * L * T * share)`, halves to even, at most `T` and at least the `sinks + 1` that are
    protected. What a full layer cannot hold goes to no other layer, and what the protected entries take is not taken
    from one, so the total may miss `ratio * L * T`. (`PRUNE_RATIO` there is the part that is *dropped*.)
    """
    wanted = [length - int(np.rint(length - ratio * len(shares) * length * share)) for share in shares]
    return [min(max(keep, sinks + 1), length) for keep in wanted]


def tgv_kv_positions(scores, keep, sinks=4, last=1):
    """Positions kept by every KV head: the first `sinks`, the last, and the highest scores between them.

    Released: as here; protected entries count towards `keep`. Where text alone exceeds `keep`, the best text stays.
    """
    length = len(scores)
    between = sorted(range(sinks, length - last), key=lambda j: (scores[j], j), reverse=True)
    return [*range(sinks), *sorted(between[: keep - sinks - last]), *range(length - last, length)]


def tgv_kv_decode(kept, decoded, vision, share, ratio, layers, protect="suffix", sinks=4):
    """Positions held by one layer after each decoded token, as lists.

    `kept` are its positions after the prompt, `decoded[s]` `[H, entries]` the attention of step `s` over the entries
    held by then and, last, the new one.

    Released `_decode`: the new token attends first; then, where the entries exceed `ratio * L * share * (tokens seen)`
    by 1 or more, *one* entry leaves: the one with the least attention of this step's query, averaged over the
    query heads. Scores are not accumulated. Protected are the first 4 entries and a suffix of the cache as long as the
    text that was kept after the picture (at least 1). The suffix ends at the newest entry (`protect="suffix"`): it
    moves on with each new token, and the text after the picture can leave.

    The summaries of the paper say no more of decoding than that new entries are appended.

    `protect="text"`: the kept text after the picture itself stays for good, and so does the newest entry; other
    generated tokens can leave. That the newest stays is a choice; the released suffix always holds it.
    """
    length, start = len(vision), text_start(vision)
    held, history = list(kept), []
    suffix = max(sum(p >= start for p in kept), 1)
    for step, weights in enumerate(decoded):
        held.append(length + step)
        attended = weights.mean(0)
        if protect == "suffix":
            candidates = range(sinks, len(held) - suffix)
        else:
            candidates = [i for i in range(sinks, len(held) - 1) if not start <= held[i] < length]
        allowed = ratio * layers * share * (length + step + 1)
        if int(len(held) - allowed) > 0 and len(candidates) > 0:
            del held[min(candidates, key=lambda i: attended[i])]
        history.append(list(held))
    return history
