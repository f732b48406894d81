"""Inputs of the goldens, from a seed alone.

NumPy guarantees the raw stream of a bit generator over its versions, but not the distributions built on it.
"""

import numpy as np


def uniform(seed, *shape):
    """Float64 numbers in [0, 1)."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def states(seed, heads, length, size, scale=1.0):
    """Queries, keys or values `[heads, length, size]`: even numbers in [-scale, scale)."""
    return (2 * uniform(seed, heads, length, size) - 1) * scale


def rows(seed, *shape):
    """Attention rows: positive numbers whose last axis sums to one."""
    weights = uniform(seed, *shape) ** 4 + 1e-6
    return weights / weights.sum(-1, keepdims=True)


def causal_rows(seed, *shape):
    """Attention `[..., T, T]`: each row sums to one over the keys up to its own position."""
    weights = np.tril(uniform(seed, *shape) ** 4 + 1e-6)
    return weights / weights.sum(-1, keepdims=True)


def self_inverse_permutation(seed, count):
    """A permutation of `count` numbers that swaps pairs, so that it is its own inverse."""
    order, permutation = np.argsort(uniform(seed, count), kind="stable").tolist(), list(range(count))
    for a, b in zip(order[0::2], order[1::2], strict=False):
        permutation[a], permutation[b] = b, a
    return permutation


def ranked_attention(seed, layers, heads, length, first):
    """Attention `[layers, heads, T, T]` whose column sums follow a permutation that is its own inverse.

    The permutation covers the columns from `first` to the last but one. The rows do not sum to one; only the column
    sums matter where it is used.
    """
    attention = []
    for layer in range(layers):
        ranks = np.array(self_inverse_permutation(seed + 31 * layer, length - 1 - first))
        sums = np.ones(length)
        sums[first : length - 1] = 1 + ranks / len(ranks)
        weights = np.tril(uniform(seed + 7 * layer, heads, length, length) + 0.01)
        attention.append(weights / weights.sum((0, 1)) * heads * sums)
    return np.stack(attention)


def axis_keys(seed, heads, length, size=128, axes=10):
    """Keys along the first `axes` axes with lengths that are powers of two: cosines are exactly 0 or 1."""
    keys = np.zeros((heads, length, size))
    for head in range(heads):
        axis = (uniform(seed + 300 + head, length) * axes).astype(int)
        keys[head, np.arange(length), axis] = 2.0 ** (uniform(seed + 400 + head, length) * 4).astype(int)
    return keys


def sharpened_rows(seed, layers, heads, length):
    """Attention `[layers, heads, T, T]`, causal; from layer to layer fewer columns take most of the weight."""
    attention = []
    for layer in range(layers):
        columns = uniform(seed + 60 + layer, length) ** (4 * layer)
        weights = causal_rows(seed + layer, heads, length, length) * (columns + 1e-4)
        attention.append(weights / weights.sum(-1, keepdims=True))
    return np.stack(attention)
