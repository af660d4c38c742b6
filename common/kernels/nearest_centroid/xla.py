"""Nearest centroid in plain XLA: tiles of scores, a running minimum over blocks of centroids."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

# Rows and centroids of one tile of float32 scores; with fewer rows, more centroids. A CPU reads the
# tile back from its caches; an accelerator wants products so long that starting them is nothing.
_CPU_TILE = (1024, 1024)
_ACCELERATOR_TILE = (16384, 4096)
_MOST_CONTENDERS = 1 << 16  # centroids of a block of `contenders`


def search(x: jax.Array, c: jax.Array, half: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where `half[k] - x.c[k]` is smallest, and that score.

    Args:
        x: Rows `[N, D]`.
        c: Centroids `[K, D]`, of the same dtype.
        half: Half the squared norm of each centroid, `[K]` in float32.

    Returns:
        The index `[N]` in int32 and the score `[N]` in float32: infinite, at index 0, if no score
        is less.
    """
    index, score = lax.platform_dependent(
        x,
        c,
        half,
        cpu=functools.partial(tiled, tile=_CPU_TILE),
        default=functools.partial(tiled, tile=_ACCELERATOR_TILE),
    )
    return index, score


def search_two(
    x: jax.Array, c: jax.Array, half: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `search`, and returns the next higher score too: the same one where two are equal."""
    index, score, following = lax.platform_dependent(
        x,
        c,
        half,
        cpu=functools.partial(tiled, tile=_CPU_TILE, two=True),
        default=functools.partial(tiled, tile=_ACCELERATOR_TILE, two=True),
    )
    return index, score, following


def contenders(
    x: jax.Array, c: jax.Array, half: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the first and the last centroid whose score is within a row's limit, and how many.

    Args:
        x, c, half: As for `search`, few rows.
        limit: Of each row, `[N]` in float32.

    Returns:
        Three times int32 `[N]`; places are in range whatever the scores are.
    """
    total = c.shape[0]
    count, size = _even(total, _MOST_CONTENDERS)

    def step(j: jax.Array | int, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = jnp.minimum(j * size, total - size)
        places = start + jnp.arange(size, dtype=jnp.int32)
        block_half = lax.dynamic_slice_in_dim(half, start, size)
        scores = block_half - _products(x, lax.dynamic_slice_in_dim(c, start, size))
        within = (scores <= limit[:, None]) & (places >= j * size)  # no centroid twice
        first = jnp.min(jnp.where(within, places, total - 1), axis=1)
        last = jnp.max(jnp.where(within, places, 0), axis=1)
        several = jnp.sum(within, axis=1, dtype=jnp.int32)
        return jnp.minimum(found[0], first), jnp.maximum(found[1], last), found[2] + several

    none = jnp.zeros((x.shape[0],), jnp.int32)
    start = none + total - 1, none, none
    first, last, several = step(0, start) if count == 1 else lax.fori_loop(0, count, step, start)
    return first, last, several


def tiled(
    x: jax.Array, c: jax.Array, half: jax.Array, *, tile: tuple[int, int], two: bool = False
) -> tuple[jax.Array, ...]:
    """Searches tile by tile of `(rows, centroids)`."""
    total = x.shape[0]
    count, size = _even(total, tile[0])
    most = tile[0] * tile[1] // size
    if count == 1:
        return _rows(x, c, half, most=most, two=two)

    def step(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last block begins early enough to be whole, and finds some rows again.
        start = jnp.minimum(i * size, total - size)
        rows = lax.dynamic_slice_in_dim(x, start, size)
        block = _rows(rows, c, half, most=most, two=two)
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(found, block, strict=True)
        )

    empty = (jnp.zeros((total,), jnp.int32), *[jnp.zeros((total,), jnp.float32)] * (1 + two))
    return lax.fori_loop(0, count, step, empty)


def _rows(
    x: jax.Array, c: jax.Array, half: jax.Array, *, most: int, two: bool
) -> tuple[jax.Array, ...]:
    """Searches for all of `x` at once, over blocks of at most `most` centroids."""
    total = c.shape[0]
    count, size = _even(total, most)

    def step(j: jax.Array | int, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        index, score = best[:2]
        # Centroids seen twice do no harm: a later score must be less, not equal.
        start = jnp.minimum(j * size, total - size)
        block = lax.dynamic_slice_in_dim(c, start, size)
        block_half = lax.dynamic_slice_in_dim(half, start, size)
        if two:  # Here it would: a row's best is its next best if seen again.
            seen = start + jnp.arange(size) < j * size
            block_half = jnp.where(seen, jnp.inf, block_half)
        at, low, *following = _tile(x, block, block_half, two=two)
        less = low < score
        found = jnp.where(less, start + at, index), jnp.where(less, low, score)
        if not two:
            return found
        between = jnp.minimum(best[2], following[0])
        return *found, jnp.minimum(between, jnp.maximum(low, score))

    rows = x.shape[0]
    worst = jnp.full((rows,), jnp.inf, jnp.float32)
    none = (jnp.zeros((rows,), jnp.int32), *[worst] * (1 + two))
    return step(0, none) if count == 1 else lax.fori_loop(0, count, step, none)


def _tile(x: jax.Array, c: jax.Array, half: jax.Array, *, two: bool) -> tuple[jax.Array, ...]:
    """Returns the first place of the smallest score in each row of one tile, and the score.

    With `two`, the next score as well. Plain minima, one after the other: the CPU backend runs an
    arg-min some ten times slower.
    """
    scores = half - _products(x, c)
    scores = jnp.where(scores < jnp.inf, scores, jnp.inf)  # no NaN
    low = jnp.min(scores, axis=1)
    places = jnp.arange(c.shape[0], dtype=jnp.int32)
    at = jnp.min(jnp.where(scores == low[:, None], places, c.shape[0] - 1), axis=1)
    if not two:
        return at, low
    return at, low, jnp.min(jnp.where(places == at[:, None], jnp.inf, scores), axis=1)


def _products(x: jax.Array, c: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, c, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _even(total: int, most: int) -> tuple[int, int]:
    """Returns the number of blocks of at most `most`, and their size, as even as can be."""
    count = math.ceil(total / most)
    return count, math.ceil(total / count)
