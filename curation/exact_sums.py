"""Sums of rows by cluster that come out the same in whatever order and in how many parts.

Numbers become integers on a grid of the whole data, whose step is 2^-39 of its span, and integers
add up without rounding: over any devices, processes and chunks. The span is a power of two, so that
float32 numbers down to 2^-15 of it lie on the grid to their last bit.

A sum is four int32 digits to the base 2^13: accelerators have no 64-bit integers of their own. The
three low ones lie in [0, 2^13) once `carry` has run; the highest has the sign. Each is an array of
its own: one with a dimension of digits takes a CPU ten times as long to add to.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LOW = 3
_BITS = 13
_BASE = 1 << _BITS
# So many rows may be added between two carries: low digits then stay below 2^30.
MOST_ROWS = 1 << 16


class Sums(NamedTuple):
    """Sums of rows `[D]` for each of K clusters; leading dimensions are parts of a whole.

    Attributes:
      low: The three low digits, lowest first, each int32 `[..., K, D]`.
      high: The highest digit, int32 `[..., K, D]`.
    """

    low: tuple[jax.Array, ...]
    high: jax.Array


def span_of(largest: float) -> float:
    """Returns the span for numbers of at most this magnitude: a power of two above it."""
    # Neither it nor what is divided by it may leave float32's range.
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -80), 127))


def zeros(clusters: int, width: int, parts: tuple[int, ...] = ()) -> Sums:
    """Returns sums of nothing."""
    low = tuple(jnp.zeros((*parts, clusters, width), jnp.int32) for _ in range(_LOW))
    return Sums(low, jnp.zeros((*parts, clusters, width), jnp.int32))


def add_rows(sums: Sums, x: jax.Array, labels: jax.Array, span: jax.Array | float) -> Sums:
    """Adds each row to the sum of its cluster; `carry` at the latest after `MOST_ROWS` of them.

    Args:
        sums: Of one part.
        x: Rows `[N, D]` in float32, none beyond `span` in magnitude.
        labels: The cluster of each row `[N]`; rows with a label of K or more are left out.
        span: As `span_of` gives it, float32.
    """
    low = (
        digit.at[labels].add(more, mode="drop")
        for digit, more in zip(sums.low, _digits(x, span), strict=True)
    )
    return Sums(tuple(low), sums.high)


def move_rows(
    sums: Sums, x: jax.Array, old: jax.Array, new: jax.Array, span: jax.Array | float
) -> Sums:
    """As `add_rows` with the labels `new`, and takes the rows from the clusters `old`."""
    low = (
        digit.at[old].add(-more, mode="drop").at[new].add(more, mode="drop")
        for digit, more in zip(sums.low, _digits(x, span), strict=True)
    )
    return Sums(tuple(low), sums.high)


def _digits(x: jax.Array, span: jax.Array | float) -> tuple[jax.Array, ...]:
    steps = x * (_BASE * _BASE / span)
    whole = jnp.round(steps)
    rest = jnp.round((steps - whole) * _BASE).astype(jnp.int32)
    whole = whole.astype(jnp.int32)
    return rest, whole & (_BASE - 1), whole >> _BITS  # the last with sign


def carry(sums: Sums) -> Sums:
    """Brings the low digits into their range; the value stays."""
    digits = [*sums.low, sums.high]
    for i in range(_LOW):
        digits[i + 1] = digits[i + 1] + (digits[i] >> _BITS)
        digits[i] = digits[i] & (_BASE - 1)
    return Sums(tuple(digits[:_LOW]), digits[_LOW])


def total(parts: Sums) -> Sums:
    """Adds up at most 2^16 parts `[P, ...]`."""
    return carry(jax.tree.map(lambda digits: jnp.sum(digits, axis=0), parts))


def means(sums: Sums, counts: jax.Array, span: jax.Array) -> jax.Array:
    """Returns the mean of each cluster `[K, D]` in float32, zero for empty ones.

    Args:
        sums: Of one part.
        counts: Rows in each cluster `[K]`.
        span: As it was for `add_rows`.
    """
    value = sums.high.astype(jnp.float32)
    for digit in reversed(sums.low):
        value = value * _BASE + digit.astype(jnp.float32)
    value = value / (_BASE * _BASE) * (span / _BASE)
    return value / jnp.maximum(counts, 1)[:, None].astype(jnp.float32)
