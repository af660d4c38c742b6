"""Adds the queries' own keys to what a kernel found in the cache."""

import jax
import jax.numpy as jnp

from common.kernels.decode_attention import ring
from common.kernels.decode_attention.ring import Options


def rows_of(q: jax.Array) -> jax.Array:
    """Returns `[B, K, T * G, h]` from `[B, T, K, G, h]`: the queries that share a head's keys."""
    batch, queries, kv_heads, group, width = q.shape
    return jnp.swapaxes(q, 1, 2).reshape(batch, kv_heads, queries * group, width)


def joined(
    options: Options,
    q: jax.Array,
    out: jax.Array,
    log_sum: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Returns the result `[B, T, K, G, h]`.

    Args:
      q: `[B, T, K, G, h]`.
      out: over the cache alone, `[B, K, T * G, h]` float32.
      log_sum: of it, `[B, K, T * G]`, minus infinity where the cache has nothing to see.
      new: the own keys and values, `[B, T, K, h]` each, or None.
    """
    batch, queries, kv_heads, group, width = q.shape
    if new is not None:
        keys, values = new
        wide = {"preferred_element_type": jnp.float32}
        scores = options.scale * jnp.einsum("bkmh,bukh->bkmu", rows_of(q), keys, **wide)
        if options.softcap is not None:
            scores = options.softcap * jnp.tanh(scores / options.softcap)
        seen = jnp.repeat(ring.visible_new(options, queries), group, axis=0)
        scores = jnp.where(seen, scores, -jnp.inf)  # A query sees itself: one at least is finite.
        maximum = jnp.maximum(log_sum, jnp.max(scores, axis=-1))
        old, latest = jnp.exp(log_sum - maximum), jnp.exp(scores - maximum[..., None])
        out = old[..., None] * out
        out = out + jnp.einsum("bkmu,bukh->bkmh", latest, values.astype(jnp.float32))
        out = out / (old + jnp.sum(latest, axis=-1))[..., None]
    out = out.astype(q.dtype).reshape(batch, kv_heads, queries, group, width)
    return jnp.swapaxes(out, 1, 2)
