"""Nearest centroid of every row, by squared Euclidean distance, with no N × K matrix.

One function, `nearest_centroid`; what runs underneath is chosen by `implementation`. Every form but
the oracle is a search with the signature of `xla.search`: the smallest `|c|^2 / 2 - x.c` of each
row and where it stands. The rest of the distance is the same for all centroids of a row and is
added here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from common.kernels.dispatch import check_implementation, dispatch, unfit
from common.kernels.nearest_centroid import reference, xla


def nearest_centroid(
    x: jax.Array, c: jax.Array, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Finds the centroid nearest to each row; of equally near ones that of the lowest index.

    The distance is `|x|^2 + (|c|^2 - 2 x.c)`, clamped at zero, in float32 whatever the inputs are:
    exact but for some 1e-7 of `|x|^2 + |c|^2`. Centre data that lies far from the origin, and
    where near ties matter compute `sum((x - c[index])**2)` anew. Two bfloat16 inputs run at the
    full speed of a matrix unit; all others are taken and multiplied as float32.

    A centroid that holds a NaN or an infinity is nearest to nothing. A row that holds a NaN gets
    index 0 and distance NaN; a row with an infinity, or without any centroid to go to, gets an
    index in range and a distance that is not finite.

    The gradient of the distance is `2 (x - c[index])` for the row and its negative for the
    centroid; the index has none.

    Args:
        x: Rows `[N, D]`.
        c: Centroids `[K, D]`.
        implementation: "reference", "xla", "tpu", "gpu", or None for the fastest of the platform.

    Returns:
        The index `[N]` in int32 and the squared distance `[N]` in float32.

    Raises:
        UserError: A shape, dtype or implementation that does not fit.
    """
    check_implementation("nearest_centroid", implementation)
    x, c = jnp.asarray(x), jnp.asarray(c)
    _check(x, c)
    both_short = x.dtype == c.dtype == jnp.bfloat16
    dtype = jnp.bfloat16 if both_short else jnp.float32
    x, c = x.astype(dtype), c.astype(dtype)
    if x.shape[0] == 0:
        return jnp.zeros((0,), jnp.int32), jnp.zeros((0,), jnp.float32)
    if implementation == "reference":
        return reference.nearest(x, c)
    return _nearest(implementation, x, c)


def _check(x: jax.Array, c: jax.Array) -> None:
    if x.ndim != 2 or c.ndim != 2 or x.shape[1] != c.shape[1]:
        raise UserError(
            f"nearest_centroid needs x [N, D] and c [K, D]; got {x.shape} and {c.shape}"
            " (use jax.vmap for more leading axes)"
        )
    if 0 in c.shape:
        raise UserError(
            f"nearest_centroid needs at least one centroid and one dimension; got c {c.shape}"
        )
    for name, array in (("x", x), ("c", c)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"nearest_centroid needs real floating inputs; {name} is {array.dtype}")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nearest(implementation: str | None, x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = 0.5 * jnp.sum(jnp.square(c.astype(jnp.float32)), axis=1)
    index, score = dispatch(
        "nearest_centroid",
        implementation,
        x,
        c,
        half,
        xla=xla.search,
        tpu=unfit("tpu", x, c) or _tpu,
        gpu=unfit("gpu", x, c) or _gpu,
    )
    rows = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1)
    return index, jnp.maximum(2 * score + rows, 0)


@_nearest.defjvp
def _nearest_jvp(
    implementation: str | None,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[Any, Any]:
    (x, c), (dx, dc) = primals, tangents
    index, distance = _nearest(implementation, x, c)
    apart = x.astype(jnp.float32) - c[index].astype(jnp.float32)
    moved = dx.astype(jnp.float32) - dc.astype(jnp.float32)[index]
    no_tangent = np.zeros(index.shape, jax.dtypes.float0)
    return (index, distance), (no_tangent, 2 * jnp.sum(apart * moved, axis=1))


# Pallas takes a while to import, and programs for a CPU alone never need it.


def _tpu(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    from common.kernels.nearest_centroid import tpu

    return tpu.search(x, c, half, interpret=interpret)


def _gpu(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    from common.kernels.nearest_centroid import gpu

    return gpu.search(x, c, half, interpret=interpret)
