"""Nearest centroid in plain XLA: tiles of scores, a running minimum over blocks of centroids."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Rows and centroids of one tile of float32 scores; with fewer rows, more centroids. A CPU reads the
# tile back from its caches; an accelerator wants products so long that starting them is nothing.
_CPU_TILE = (2048, 1024)
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


class Contenders(NamedTuple):
    """Of each row, what `search_two` finds, and which scores are within its limit.

    Attributes:
        first, last: The first and the last centroid within the limit, int32 `[N]`; in range
            whatever the scores are.
        count: How many are, int32 `[N]`.
        index, score, following: Where the least score is, int32 `[N]`, that score and the next.
    """

    first: jax.Array
    last: jax.Array
    count: jax.Array
    index: jax.Array
    score: jax.Array
    following: jax.Array


def contenders(x: jax.Array, c: jax.Array, half: jax.Array, limit: jax.Array) -> Contenders:
    """Searches for the centroids whose score is within a row's limit.

    Args:
        x, c, half: As for `search`, few rows.
        limit: Of each row, `[N]` in float32.
    """
    total = c.shape[0]
    count, size = _even(total, _MOST_CONTENDERS)

    def step(j: jax.Array | int, found: Contenders) -> Contenders:
        start = jnp.minimum(j * size, total - size)
        places = start + jnp.arange(size, dtype=jnp.int32)
        block_half = lax.dynamic_slice_in_dim(half, start, size)
        block_half = jnp.where(places >= j * size, block_half, jnp.inf)  # no centroid twice
        scores = _scores(x, lax.dynamic_slice_in_dim(c, start, size), block_half)
        at, low, following = _least(scores, two=True)
        within, places = scores <= limit, places[:, None]
        return Contenders(
            jnp.minimum(found.first, jnp.min(jnp.where(within, places, total - 1), axis=0)),
            jnp.maximum(found.last, jnp.max(jnp.where(within, places, 0), axis=0)),
            found.count + jnp.sum(within, axis=0, dtype=jnp.int32),
            *_better((found.index, found.score, found.following), (start + at, low, following)),
        )

    none, worst = jnp.zeros((x.shape[0],), jnp.int32), jnp.full((x.shape[0],), jnp.inf)
    start = Contenders(none + total - 1, none, none, none, worst, worst)
    return step(0, start) if count == 1 else lax.fori_loop(0, count, step, start)


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
        # Centroids seen twice do no harm: a later score must be less, not equal.
        start = jnp.minimum(j * size, total - size)
        block = lax.dynamic_slice_in_dim(c, start, size)
        block_half = lax.dynamic_slice_in_dim(half, start, size)
        if two:  # Here it would: a row's best is its next best if seen again.
            seen = start + jnp.arange(size) < j * size
            block_half = jnp.where(seen, jnp.inf, block_half)
        at, *scores = _least(_scores(x, block, block_half), two=two)
        return _better(best, (start + at, *scores))

    rows = x.shape[0]
    worst = jnp.full((rows,), jnp.inf, jnp.float32)
    none = (jnp.zeros((rows,), jnp.int32), *[worst] * (1 + two))
    return step(0, none) if count == 1 else lax.fori_loop(0, count, step, none)


def _better(best: tuple[jax.Array, ...], found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns index, score (and the following score) of two lots of centroids."""
    (index, score, *following), (at, low, *after) = best, found
    less = low < score
    both = [
        jnp.minimum(jnp.minimum(*pair), jnp.maximum(low, score))
        for pair in zip(following, after, strict=True)
    ]
    return jnp.where(less, at, index), jnp.where(less, low, score), *both


def _scores(x: jax.Array, c: jax.Array, half: jax.Array) -> jax.Array:
    """Returns the scores of one tile, `[K, N]`: a CPU takes least ones fastest down the columns."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    products = lax.dot_general(
        c, x, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    scores = half[:, None] - products
    return jnp.where(scores < jnp.inf, scores, jnp.inf)  # no NaN


def _least(scores: jax.Array, *, two: bool) -> tuple[jax.Array, ...]:
    """Returns the first place of the smallest score of each row of one tile, and the score.

    With `two`, the next score as well. Plain minima, one after the other: the CPU backend runs an
    arg-min some ten times slower.
    """
    low = jnp.min(scores, axis=0)
    places = jnp.arange(len(scores), dtype=jnp.int32)[:, None]
    at = jnp.min(jnp.where(scores == low, places, len(scores) - 1), axis=0)
    if not two:
        return at, low
    return at, low, jnp.min(jnp.where(places == at, jnp.inf, scores), axis=0)


def _even(total: int, most: int) -> tuple[int, int]:
    """Returns the number of blocks of at most `most`, and their size, as even as can be."""
    count = math.ceil(total / most)
    return count, math.ceil(total / count)
