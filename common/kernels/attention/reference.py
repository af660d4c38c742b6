"""Oracle of attention: the definition in float32, with all scores in memory."""

import jax
import jax.numpy as jnp

from common.kernels.attention.options import Options, allowed_pairs


def attention(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    offset: jax.Array | None,
) -> jax.Array:
    """Returns `[B, K, G, T, h]` from q `[B, K, G, T, h]`, k and v `[B, K, S, h]`, all float32."""
    dtype = q.dtype
    q, k, v = (value.astype(jnp.float32) for value in (q, k, v))
    scores = options.scale * jnp.einsum("bkgth,bksh->bkgts", q, k)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    allowed = allowed_pairs(options, mask, segments, offset, q.shape[-2], k.shape[-2])
    if allowed is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        # Rows with no allowed key hold equal finite scores, so that their softmax, which the
        # second `where` then discards, has no NaN to leak into the gradient.
        weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
        weights = jnp.where(allowed, weights, 0.0)
    return jnp.einsum("bkgts,bksh->bkgth", weights, v).astype(dtype)
