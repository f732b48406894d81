"""PyramidKV (arXiv 2406.02069)."""


def pyramidkv_shares(layers, keep, window=8, beta=20):
    """The paper's budgets as real numbers, the window included: their mean is exactly `keep`.

    Paper, section 4.2.1 and eq. 1: the last `window` tokens stay in every layer; of the rest,
    `k_total = layers * (keep - window)`, the top layer gets `k_total / (beta * layers)`, the bottom layer
    `2 * k_total / layers` less that, and the layers between lie on the line. Section 5.1: window 8; beta 20.
    """
    top = (keep - window) / beta
    bottom = 2 * (keep - window) - top
    return [window + bottom - (bottom - top) * layer / (layers - 1) for layer in range(layers)]


def pyramidkv_budgets(layers, keep, length, window=8, beta=20, above_half="uniform"):
    """Entries that each layer keeps, the window included, as the released code counts them.

    Released (Zefan-Cai/KVCache-Factory, `pyramidkv/pyramidkv_utils.py`, `PyramidKVCluster.update_kv`; window 8 from
    `run_longbench.py`): integers. With `base = keep - window`: `low = base // beta`, `high = 2 * base - low`; where
    `high >= length - window`, `high = length - window` and `low = 2 * base - high`; layer `l` keeps
    `high - l * ((high - low) // (layers - 1))` and the window. A prompt shorter than `keep` is kept in full; one
    shorter than `2 * base` gets `keep` in every layer, so that the raised `low` matters only just below half of the
    prompt.

    Differences: the step is rounded down, so the total exceeds the paper's by up to `layers * (layers - 1) / 2`.
    `above_half="raise"` is AdaKV's release of the same method (`snapkv_utils.py`, `SnapKVCluster.update_kv` with
    `pyram_mode`): no uniform case, `low` is raised instead.
    """
    base = keep - window
    if length < keep:
        return [length] * layers
    if above_half == "uniform" and length < 2 * base:
        return [keep] * layers
    low = base // beta
    high = 2 * base - low
    if high >= length - window:
        high = length - window
        low = 2 * base - high
    step = (high - low) // (layers - 1)
    return [high - layer * step + window for layer in range(layers)]
