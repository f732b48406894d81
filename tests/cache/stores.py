"""Dense and ragged stores with random entries, and the same as plain lists."""

import torch

from sparsight.cache.dense_store import DenseStore
from sparsight.cache.ragged_store import RaggedStore


def filled(kind, held, kv_heads=2, size=8, dtype=torch.float32, seed=0, value_size=None):
    """A store with ``held[n]`` random entries of each row at even positions, and lists of (position, key, value)."""
    generator = torch.Generator().manual_seed(seed)
    like, like_values = (torch.zeros(1, kv_heads, 1, width, dtype=dtype) for width in (size, value_size or size))
    store = {"dense": DenseStore, "ragged": RaggedStore}[kind].allocate(held, like, like_values)
    rows = []
    for row, count in enumerate(held):
        keys, values = (
            torch.randn(1, count, width, generator=generator).to(dtype) for width in (size, value_size or size)
        )
        store.fill(row, keys, values, 2 * torch.arange(count)[None])
        rows.append([(2 * i, keys[0, i], values[0, i]) for i in range(count)])
    return store, rows


def attention_over_lists(rows, query, kv_heads, scaling, visible):
    """Softmax over each row's own entries, float64; ``visible(b, i, position)`` says what new tokens attend to.

    Returns the output and, by row, the attention that each entry received, averaged over the row's query heads.
    """
    batch, heads, count, _ = query.shape
    group = heads // kv_heads
    output = query.new_empty(batch, heads, count, len(rows[0][0][2]))
    received = [dict.fromkeys((position for position, _, _ in row), 0.0) for row in rows]
    for b in range(batch):
        for h in range(heads):
            row = b * kv_heads + h // group
            for i in range(count):
                seen = [entry for entry in rows[row] if visible(b, i, entry[0])]
                positions, keys, values = zip(*seen, strict=True)
                keys, values = torch.stack(keys).double(), torch.stack(values).double()
                weights = (keys @ query[b, h, i].double() * scaling).softmax(0)
                output[b, h, i] = weights @ values
                for position, weight in zip(positions, weights.tolist(), strict=True):
                    received[row][position] += weight / group
    return output, received


def check_entries(store, rows):
    """The store holds what the lists hold, and knows how many that is."""
    assert store.held.tolist() == [len(row) for row in rows]
    for row, expected in enumerate(rows):
        positions, keys, values = store.entries(row)
        ordered = sorted(expected, key=lambda entry: entry[0])
        assert positions.tolist() == [position for position, _, _ in ordered]
        if ordered:
            assert torch.equal(keys, torch.stack([key for _, key, _ in ordered]))
            assert torch.equal(values, torch.stack([value for _, _, value in ordered]))
