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
    return lax.platform_dependent(
        x,
        c,
        half,
        cpu=functools.partial(tiled, tile=_CPU_TILE),
        default=functools.partial(tiled, tile=_ACCELERATOR_TILE),
    )


def tiled(
    x: jax.Array, c: jax.Array, half: jax.Array, *, tile: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Searches tile by tile of `(rows, centroids)`."""
    total = x.shape[0]
    count, size = _even(total, tile[0])
    most = tile[0] * tile[1] // size
    if count == 1:
        return _rows(x, c, half, most=most)

    def step(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last block begins early enough to be whole, and finds some rows again.
        start = jnp.minimum(i * size, total - size)
        block = _rows(lax.dynamic_slice_in_dim(x, start, size), c, half, most=most)
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(found, block, strict=True)
        )

    empty = (jnp.zeros((total,), jnp.int32), jnp.zeros((total,), jnp.float32))
    return lax.fori_loop(0, count, step, empty)


def _rows(x: jax.Array, c: jax.Array, half: jax.Array, *, most: int) -> tuple[jax.Array, jax.Array]:
    """Searches for all of `x` at once, over blocks of at most `most` centroids."""
    total = c.shape[0]
    count, size = _even(total, most)

    def step(j: jax.Array | int, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, score = best
        # Centroids seen twice do no harm: a later score must be less, not equal.
        start = jnp.minimum(j * size, total - size)
        block = lax.dynamic_slice_in_dim(c, start, size)
        at, low = _tile(x, block, lax.dynamic_slice_in_dim(half, start, size))
        less = low < score
        return jnp.where(less, start + at, index), jnp.where(less, low, score)

    rows = x.shape[0]
    none = (jnp.zeros((rows,), jnp.int32), jnp.full((rows,), jnp.inf, jnp.float32))
    return step(0, none) if count == 1 else lax.fori_loop(0, count, step, none)


def _tile(x: jax.Array, c: jax.Array, half: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first place of the smallest score in each row of one tile, and the score.

    Two plain minima: the CPU backend runs an arg-min some ten times slower.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    products = lax.dot_general(
        x, c, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    scores = half - products
    scores = jnp.where(scores < jnp.inf, scores, jnp.inf)  # no NaN
    low = jnp.min(scores, axis=1)
    places = jnp.arange(c.shape[0], dtype=jnp.int32)
    at = jnp.min(jnp.where(scores == low[:, None], places, c.shape[0] - 1), axis=1)
    return at, low


def _even(total: int, most: int) -> tuple[int, int]:
    """Returns the number of blocks of at most `most`, and their size, as even as can be."""
    count = math.ceil(total / most)
    return count, math.ceil(total / count)
