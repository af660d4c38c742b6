"""A pseudo-random permutation of `range(size)` that is computed, not stored.

A Feistel network over a grid of rows and columns that just holds the range. Any slice of the order
costs only its own length, whatever the epoch or the process, and the order does not depend on the
version of NumPy as `Generator.permutation` may.
"""

import math

import numpy as np

_ROUNDS = 6


def mix(values: np.ndarray) -> np.ndarray:
    """Scrambles uint64 values one to one (the finaliser of SplitMix64)."""
    x = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Image of `indices` under the permutation of `range(size)` that `seed` names.

    Args:
        indices: int64 [N], each in `[0, size)`.
        size: Length of the permuted range.
        seed: Any integer from 0; different seeds give unrelated orders.

    Returns:
        int64 [N], each in `[0, size)`.
    """
    if size <= 1:
        return np.zeros_like(indices)
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    seeds = np.array([(seed * _ROUNDS + r) % 2**64 for r in range(_ROUNDS)], np.uint64)
    round_keys = mix(mix(seeds))
    values = _rounds(np.array(indices, np.uint64), rows, columns, round_keys)
    # The last few places of the grid are none of the range: walk on from there until inside.
    while (outside := values >= np.uint64(size)).any():
        values[outside] = _rounds(values[outside], rows, columns, round_keys)
    return values.astype(np.int64)


def _rounds(values: np.ndarray, rows: int, columns: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass over the grid: each coordinate in turn is moved by a hash of the other."""
    height, width = np.uint64(rows), np.uint64(columns)
    row, column = values // width, values % width
    for key_row, key_column in round_keys.reshape(-1, 2):
        row = (row + mix(column ^ key_row) % height) % height
        column = (column + mix(row ^ key_column) % width) % width
    return row * width + column
