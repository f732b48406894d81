"""Stage 3, compaction: evict or merge, and copy what stays into storage of that size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.cache.dense_store import DenseStore
from sparsight.cache.kv_store import KVStore
from sparsight.cache.prefill import Prefill
from sparsight.cache.ragged_store import RaggedStore
from sparsight.cache.step_metadata import writable
from sparsight.compression.allocate import KeepRatio
from sparsight.compression.eviction import EvictionState


def by_head(ratios: Sequence[KeepRatio], heads: int) -> list[list[float]]:
    """What each KV head of each sequence keeps."""
    return [list(ratio) if isinstance(ratio, list) else [ratio] * heads for ratio in ratios]


def compact(prefill: Prefill, ratios: Sequence[KeepRatio]) -> tuple[KVStore, list[int], bool]:
    """The entries of one layer that stay when ``ratios[b]`` of each sequence's prompt may; at least one a KV head.

    Returns:
        The store, the number of prompt entries that each row kept, and whether that is fewer than planned.
    """
    recipe, prompt = prefill.recipe, prefill.prompt
    heads = prefill.keys.shape[1]
    planned, kept, selections = [], [], []
    for sequence, (span, ratio) in enumerate(zip(prompt.spans, ratios, strict=True)):
        states = prefill.scores[sequence], *prefill.entries(sequence)
        # Heads that keep the same number are selected together.
        groups = [slice(head, head + 1) for head in range(heads)] if isinstance(ratio, list) else [slice(heads)]
        for group, share in zip(groups, ratio if isinstance(ratio, list) else [ratio], strict=True):
            score, keys, values, places = (each[group] for each in states)
            count = max(1, round(share * span.length))
            planned += [count] * len(score)
            kept += [min(count, keys.shape[1])] * len(score)
            selections.append((kept[-1], score, keys, values, places, span.start))
    storage = RaggedStore if recipe.allocate.head_wise else DenseStore
    store = storage.allocate(kept, prefill.keys, prefill.values)
    row = 0
    for count, score, keys, values, places, start in selections:
        chosen = recipe.reduce.select(score.gather(1, places), count)
        keys, values = recipe.reduce.apply(keys, values, chosen)
        store.fill(row, keys, values, places.gather(1, chosen) + start)
        row += len(score)
    length = prompt.length
    if prefill.seen > length:
        # Assisted generation brings its first candidates together with the prompt.
        store.append(prefill.keys[:, :, length:], prefill.values[:, :, length:], length)
    return store, kept, kept != planned


@writable
def begin_eviction(prefill: Prefill, ratios: Sequence[KeepRatio], store: KVStore) -> EvictionState:
    """The eviction state of rows that hold what they kept of a prompt."""
    prompt, device = prefill.prompt, store.held.device
    heads = store.heads
    ratio = torch.tensor(by_head(ratios, heads), dtype=torch.float64, device=device).flatten()
    padding = torch.tensor([prompt.length - span.length for span in prompt.spans], dtype=torch.float64, device=device)
    rule = prefill.recipe.decode
    scores = _scores_of(prefill, store) if rule.tracks_attention else torch.zeros(len(ratio), 0, device=device)
    zeros = torch.zeros_like(store.held)
    state = EvictionState(ratio, padding.repeat_interleave(heads), torch.zeros_like(ratio), zeros, zeros.int(), scores)
    rule.protect(store, state, prefill.seen)
    return state


def _scores_of(prefill: Prefill, store: KVStore) -> Tensor:
    """What the decode rule starts from, the prompt's score of the entry in each slot, float32 ``[N, C]``."""
    positions = store.positions.unflatten(0, (-1, store.heads))
    found = []
    for score, span, own in zip(prefill.scores, prefill.prompt.spans, positions, strict=True):
        places = (own - span.start).long()
        of_prompt = (places >= 0) & (places < span.length)
        scores = score.gather(1, places.clamp(0, span.length - 1)) * of_prompt
        found.append(prefill.recipe.decode.first_scores(scores, places, span))
    return torch.cat(found)
