"""The arithmetic of one tile of attention: scores, and the gradient through them."""

import math

import jax
import jax.numpy as jnp

from common.kernels.attention.options import Options


def product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Einsum with a float32 result; both operands enter in the dtype of `right`.

    16-bit operands with a 32-bit result are the fast case of every matrix unit, CPUs included.
    """
    return jnp.einsum(spec, left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def raw_scores(options: Options, q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the scores `[B, K, G, t, s]` in float32, soft-capped but not masked.

    The queries are scaled, which are fewer than the scores, where that rounds nothing away.
    """
    scale = options.scale
    if q.dtype == jnp.float32 or math.frexp(scale)[0] == 0.5:
        scores = product("bkgth,bksh->bkgts", q * jnp.asarray(scale, q.dtype), k)
    else:
        scores = scale * product("bkgth,bksh->bkgts", q, k)
    if options.softcap is None:
        return scores
    return options.softcap * jnp.tanh(scores / options.softcap)


def masked(scores: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Puts minus infinity where a pair is not allowed."""
    return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


def rows_of(q: jax.Array) -> jax.Array:
    """`[B, K, G, t, h] -> [B, K, G t, h]`: a group's heads, which read the same keys, in a row."""
    return q.reshape(*q.shape[:2], -1, q.shape[-1])


def scores_of_rows(
    options: Options, rows: jax.Array, k: jax.Array, allowed: jax.Array | None, queries: int
) -> jax.Array:
    """Returns the scores `[B, K, G t, s]` of `rows_of`, masked.

    Without an axis of the heads, which XLA's CPU backend would copy the scores for.

    Args:
      options: the call's.
      rows: `[B, K, G t, h]`.
      k: `[B, K, s, h]`.
      allowed: broadcastable to `[B, K, G, t, s]`, or None.
      queries: t.
    """
    scores = raw_scores(options, rows[:, :, None], k)
    if allowed is not None:
        apart = scores.reshape(*rows.shape[:2], -1, queries, k.shape[-2])
        scores = masked(apart, allowed)
    return scores.reshape(*rows.shape[:3], k.shape[-2])


def weighted_sum(weights: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the total of the weights `[B, K, r]` and the values' weighted sum `[B, K, r, h]`.

    The weights that are added up are those that the values are weighted by, in the values' dtype.
    """
    weights = weights.astype(v.dtype)
    total = jnp.sum(weights, axis=-1, dtype=jnp.float32)
    return total, product("bkrs,bksh->bkrh", weights, v)


def finite(maximum: jax.Array) -> jax.Array:
    """Replaces minus infinity, the maximum of a row with nothing allowed, by 0."""
    return jnp.where(jnp.isneginf(maximum), 0.0, maximum)


def normalise(total: jax.Array, weighted: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Divides the weighted values `[.., t, h]` by their total weight `[.., t]`; 0 / 0 is 0."""
    total = jnp.where(total == 0.0, 1.0, total)
    return (weighted / total[..., None]).astype(dtype)


def log_sum_of(total: jax.Array, maximum: jax.Array) -> jax.Array:
    """Returns the log of the softmax's denominator; infinity for rows with nothing allowed.

    With infinity, `exp(score - log_sum)` is 0 in such rows, and so are all their gradients.
    """
    empty = total == 0.0
    return jnp.where(empty, jnp.inf, maximum + jnp.log(jnp.where(empty, 1.0, total)))


def gradients(
    options: Options,
    operands: tuple[jax.Array, jax.Array, jax.Array],
    allowed: jax.Array | None,
    log_sum: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the tile's share of `(dq, dk, dv)` in float32."""
    q, k, v = operands
    capped = raw_scores(options, q, k)
    weights = jnp.exp(masked(capped, allowed) - log_sum[..., None])
    dv = _sum_of_outer(weights, d_out.astype(v.dtype))
    d_weights = product("bkgth,bksh->bkgts", d_out, v)
    d_scores = options.scale * weights * (d_weights - delta[..., None])
    if options.softcap is not None:
        d_scores *= 1.0 - jnp.square(capped / options.softcap)
    dq = product("bkgts,bksh->bkgth", d_scores, k)
    dk = _sum_of_outer(d_scores, q)
    return dq, dk, dv


def _sum_of_outer(pairs: jax.Array, rows: jax.Array) -> jax.Array:
    """`[B, K, G, t, s]`, `[B, K, G, t, h]` -> `[B, K, s, h]` fp32.

    XLA's CPU backend transposes the first operand of such a product in memory, in fp32 at a third
    of its speed. So there the rows, which are few, come first, and the result is turned.
    """
    if rows.dtype != jnp.float32:
        return product("bkgts,bkgth->bksh", pairs, rows)
    turned = product("bkght,bkgts->bkghs", jnp.swapaxes(rows, -1, -2), pairs)
    return jnp.swapaxes(jnp.sum(turned, axis=2), -1, -2)
