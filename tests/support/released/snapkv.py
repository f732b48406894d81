"""SnapKV (arXiv 2404.14469)."""

from tests.support.released.common import window_scores, with_window


def snapkv(attention, keep, kv_heads, window=32, kernel=7, pooling="max"):
    """Positions kept by each KV head.

    Paper: the last `window` queries vote, the votes are pooled over neighbours, the best `keep - window` positions
    before the window stay and so does the window.

    Released (FasterDecoding/SnapKV, `snapkv/monkeypatch/snapkv_utils.py`, `SnapKVCluster.update_kv` and
    `init_snapkv`): the same. Its LongBench runs (`experiments/LongBench/config/ablation_*_w32_k7_maxpool.json`) use
    window 32, kernel 7 and max pooling; the library defaults are window 32, kernel 5 and average pooling. A prompt
    shorter than `keep` is kept in full. `keep` must exceed the window (an assertion).

    Difference, grouped queries: the released code repeats the keys and selects (and stores) per query head; pass
    `kv_heads` equal to the query heads for that. Averaging the votes of a group before pooling is what the authors of
    PyramidKV and AdaKV do (`pyramidkv_utils.py` `_grouped_window_attn_cache`; AdaKV `snapkv_utils.py` with
    `gqa_support`).
    """
    length = attention.shape[-1]
    if keep >= length:
        return [list(range(length))] * kv_heads
    assert keep > window
    return [with_window(s, keep - window, window) for s in window_scores(attention, window, kernel, pooling, kv_heads)]
