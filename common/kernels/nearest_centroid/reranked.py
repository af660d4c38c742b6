"""Nearest centroid at the speed of bfloat16 with the winners of float32.

All scores are computed from rounded operands. Where a row's two best are further apart than
rounding can have moved them, the winner is certain. Of the other rows, some per cent of usual data,
most have two contenders that close, whose distances are computed in float32; the rest is compared
with all centroids anew in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from common.kernels.dispatch import dispatch, unfit
from common.kernels.nearest_centroid import nearest_centroid, xla

# Rounding to bfloat16 moves a number by at most 2^-8 of it. For two scores of a row these errors
# add up, like random signs, to about 0.6 of 2^-8 times the root of sum(x^2 c^2), which is at most
# |x|_4 |c|_4: a margin of six to seven standard deviations.
_MARGIN = 4 * 2.0**-8
# Uncertain rows compared at a time: with their two contenders, with all centroids.
_BATCH, _REST = 128, 64


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
    short = x.astype(jnp.bfloat16), c.astype(jnp.bfloat16)
    index, score, following = dispatch(
        "nearest_centroid",
        None,
        *short,
        half,
        xla=xla.search_two,
        tpu=unfit("tpu", *short) or _tpu,
        gpu=unfit("gpu", *short) or _gpu,
    )
    margin = _MARGIN * _fourth_norm(x) * jnp.max(_fourth_norm(c))
    uncertain = ~(following - score > margin)
    between_two = functools.partial(_between_two, x, c, *short, half, score + margin)
    index, uncertain = _decide(between_two, (index, uncertain), uncertain, _BATCH)
    among_all = functools.partial(_among_all, x, c)
    (index,) = _decide(among_all, (index,), uncertain, _REST)
    return index, squared_distance(x, c, index)


def nearest_float32(x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `nearest_reranked`, by products of float32 alone."""
    x, c = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    index, _ = nearest_centroid(x, c)
    return index, squared_distance(x, c, index)


def squared_distance(x: jax.Array, c: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `sum((x - c[index])**2)` `[N]`."""
    return jnp.sum(jnp.square(x - c[index]), axis=1)


def marked_first(marked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns places in `marked [N]`, those that are true first, int32; and how many are true."""
    place = jnp.cumsum(marked, dtype=jnp.int32)
    total = len(marked)
    order = jnp.zeros((total,), jnp.int32)
    order = order.at[jnp.where(marked, place - 1, total)].set(jnp.arange(total), mode="drop")
    return order, place[-1]


def _decide(
    decided: Callable[[jax.Array], tuple[jax.Array, ...]],
    found: tuple[jax.Array, ...],
    uncertain: jax.Array,
    batch: int,
) -> tuple[jax.Array, ...]:
    """Returns what was found with what is decided of uncertain rows, a batch at a time."""
    batch = min(batch, len(uncertain))
    order, count = marked_first(uncertain)

    def step(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last batch begins early enough to be whole: it decides some rows again, or, where
        # there is but one batch, the first row.
        rows = lax.dynamic_slice_in_dim(order, jnp.minimum(i * batch, len(order) - batch), batch)
        return tuple(
            whole.at[rows].set(part) for whole, part in zip(found, decided(rows), strict=True)
        )

    return lax.fori_loop(0, (count + batch - 1) // batch, step, found)


def _between_two(
    x: jax.Array,
    c: jax.Array,
    short_x: jax.Array,
    short_c: jax.Array,
    half: jax.Array,
    limit: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the nearer contender of some rows, and whether they have others than two."""
    first, last, count = xla.contenders(short_x[rows], short_c, half, limit[rows])
    wide = x[rows]
    nearer = squared_distance(wide, c, last) < squared_distance(wide, c, first)
    return jnp.where(nearer, last, first), (count < 1) | (count > 2)


def _among_all(x: jax.Array, c: jax.Array, rows: jax.Array) -> tuple[jax.Array]:
    return (nearest_centroid(x[rows], c)[0],)


def _fourth_norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(jnp.square(x)), axis=1)))


# Pallas takes a while to import, and programs for a CPU alone never need it.


def _tpu(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from common.kernels.nearest_centroid import tpu

    return tpu.search_two(x, c, half, interpret=interpret)


def _gpu(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from common.kernels.nearest_centroid import gpu

    return gpu.search_two(x, c, half, interpret=interpret)
