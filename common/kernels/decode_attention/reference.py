"""Oracle of decode attention: the keys that a query may see, written out, in float32."""

import jax
import jax.numpy as jnp

from common.kernels.decode_attention import ring
from common.kernels.decode_attention.ring import Options


def attention(
    options: Options,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Returns `[B, T, K, G, h]` from q `[B, T, K, G, h]` and keys, values `[B, K, S, h]`."""
    queries = q.shape[1]
    stand = ring.own_positions(lengths, queries, new)
    allowed = ring.visible(options, lengths, starts, stand, keys.shape[2])
    if new is not None:
        keys, values = (
            jnp.concatenate([cache, jnp.swapaxes(own, 1, 2)], axis=2)
            for cache, own in ((keys, new[0]), (values, new[1]))
        )
        seen = jnp.broadcast_to(ring.visible_new(options, queries), (q.shape[0], queries, queries))
        allowed = jnp.concatenate([allowed, seen], axis=2)
    wide_q, keys, values = (x.astype(jnp.float32) for x in (q, keys, values))
    scores = options.scale * jnp.einsum("btkgh,bksh->bkgts", wide_q, keys)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    allowed = allowed[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    weights = jnp.where(allowed, weights, 0.0)
    return jnp.einsum("bkgts,bksh->btkgh", weights, values).astype(q.dtype)
