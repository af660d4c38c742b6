"""Nearest centroid at the speed of bfloat16 with the winners of float32.

All scores are computed from rounded operands. Where a row's two best are further apart than
rounding can have moved them, the winner is certain; the other rows, a few per cent of usual data,
are compared with all centroids anew in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from common.kernels.nearest_centroid import nearest_centroid, xla

# Rounding to bfloat16 moves a number by at most 2^-8 of it. For two scores of a row these errors
# add up, like random signs, to about 0.6 of 2^-8 times the root of sum(x^2 c^2), which is at most
# |x|_4 |c|_4: a margin of six to seven standard deviations.
_MARGIN = 4 * 2.0**-8
# Uncertain rows compared at a time.
_BATCH = 128


def nearest_reranked(x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the centroid nearest to each row: as `nearest_centroid`, of float32 rows.

    Near ties are decided by float32 products, among equal ones the lowest index wins. The distance
    is `sum((x - c[index])**2)`, without cancellation. Rows and centroids must be finite.

    Args:
        x: Rows `[N, D]` in float32.
        c: Centroids `[K, D]` in float32.

    Returns:
        The index `[N]` in int32 and the squared distance `[N]` in float32.
    """
    x, c = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    half = 0.5 * jnp.sum(jnp.square(c), axis=1)
    index, score, following = xla.search_two(x.astype(jnp.bfloat16), c.astype(jnp.bfloat16), half)
    margin = _MARGIN * _fourth_norm(x) * jnp.max(_fourth_norm(c))
    index = _decide(x, c, index, ~(following - score > margin))
    return index, squared_distance(x, c, index)


def nearest_float32(x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `nearest_reranked`, by products of float32 alone."""
    x, c = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    index, _ = nearest_centroid(x, c)
    return index, squared_distance(x, c, index)


def squared_distance(x: jax.Array, c: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `sum((x - c[index])**2)` `[N]`."""
    return jnp.sum(jnp.square(x - c[index]), axis=1)


def _decide(x: jax.Array, c: jax.Array, index: jax.Array, uncertain: jax.Array) -> jax.Array:
    """Returns the index with that of uncertain rows found in float32, a batch at a time."""
    total = x.shape[0]
    batch = min(_BATCH, total)
    count = jnp.sum(uncertain, dtype=jnp.int32)
    order = jnp.argsort(~uncertain, stable=True).astype(jnp.int32)

    def step(i: jax.Array, index: jax.Array) -> jax.Array:
        # The last batch begins early enough to be whole, and decides some rows again.
        rows = lax.dynamic_slice_in_dim(order, jnp.minimum(i * batch, total - batch), batch)
        return index.at[rows].set(nearest_centroid(x[rows], c)[0])

    return lax.fori_loop(0, (count + batch - 1) // batch, step, index)


def _fourth_norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(jnp.square(x)), axis=1)))
