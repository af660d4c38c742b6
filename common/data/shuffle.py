"""A pseudo-random permutation of `range(size)` that is computed, not stored.

A Feistel network over the next power of four, walked until the value falls inside
the range. Any slice of the order costs only its own length, whatever the epoch or the process, and
the order does not depend on the version of NumPy as `Generator.permutation` may.
"""

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
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = np.uint64((1 << half_bits) - 1)
    seeds = np.array([(seed * _ROUNDS + r) % 2**64 for r in range(_ROUNDS)], np.uint64)
    round_keys = mix(mix(seeds))
    values = np.array(indices, np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        moved = _feistel(values[outside], round_keys, np.uint64(half_bits), mask)
        values[outside] = moved
        outside[outside] = moved >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(
    values: np.ndarray, round_keys: np.ndarray, half_bits: np.uint64, mask: np.uint64
) -> np.ndarray:
    left, right = values >> half_bits, values & mask
    for key in round_keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half_bits) | right
