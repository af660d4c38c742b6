"""The arithmetic of a running softmax inside a kernel.

Scores are held in powers of two, since `exp2` is what the hardware has.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = 1.0 / math.log(2.0)


def scores(
    q: jax.Array, k: jax.Array, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scores `q k^T` for `exp2`, and the tanh of the soft cap if there is one."""
    products = contract(q, k, (1, 1))
    if softcap is None:
        return products * (scale * LOG2_E), None
    tanh = jnp.tanh(products * (scale / softcap))
    return tanh * (softcap * LOG2_E), tanh


def finite(maximum: jax.Array) -> jax.Array:
    """Replaces minus infinity, the maximum of a row with nothing allowed, by 0."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def contract(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product of two matrices in the dtype of `right`, with a float32 result.

    Args:
      axes: the axis of each that is summed over.
    """
    return lax.dot_general(
        left.astype(right.dtype),
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=_precision(right.dtype),
        preferred_element_type=jnp.float32,
    )


def _precision(dtype: jnp.dtype) -> lax.Precision:
    """Returns what `jax.default_matmul_precision` asks for, of the two that kernels have."""
    wanted = jax.config.jax_default_matmul_precision
    fast = dtype.itemsize == 2 or wanted in (None, "default", "fastest", "bfloat16")
    return lax.Precision.DEFAULT if fast else lax.Precision.HIGHEST
