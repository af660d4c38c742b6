"""Decode attention in plain XLA: one pass over the whole ring, in the order in which it lies."""

import jax
import jax.numpy as jnp

from common.kernels.decode_attention import ring
from common.kernels.decode_attention.own_keys import rows_of
from common.kernels.decode_attention.ring import Options

# Finite, so that a row with nothing to see stays free of NaN.
_MASKED = -2.3819763e38


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
    batch, queries, kv_heads, group, width = q.shape
    rows = rows_of(q)
    own = ring.own_positions(lengths, queries, new)
    slots = keys.shape[2]
    allowed = ring.visible(options, lengths, starts, own, slots)
    wide = {"preferred_element_type": jnp.float32}
    # The ring as the left operand is read as it lies; as the right one it would be transposed.
    logits = jnp.swapaxes(jnp.einsum("bksh,bkmh->bksm", keys.astype(q.dtype), rows, **wide), 2, 3)
    if new is not None:
        latest = jnp.einsum("bkmh,bukh->bkmu", rows, new[0], **wide)
        logits = jnp.concatenate([logits, latest], axis=-1)
        seen = jnp.broadcast_to(ring.visible_new(options, queries), (batch, queries, queries))
        allowed = jnp.concatenate([allowed, seen], axis=-1)
    logits = logits * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    allowed = jnp.repeat(allowed, group, axis=1)[:, None] if queries > 1 else allowed[:, None]
    weights = jax.nn.softmax(jnp.where(allowed, logits, _MASKED), axis=-1)
    if new is None:
        weights = jnp.where(allowed, weights, 0.0)
    weights = weights.astype(q.dtype)
    out = jnp.einsum("bkms,bksh->bkmh", weights[..., :slots], values.astype(q.dtype), **wide)
    if new is not None:
        out = out + _latest(weights[..., slots:], new[1])
    out = out.astype(q.dtype).reshape(batch, kv_heads, queries, group, width)
    return jnp.swapaxes(out, 1, 2)


def _latest(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns what the own tokens add, `[B, K, M, h]` from `[B, K, M, T]` and `[B, T, K, h]`."""
    weights, values = weights.astype(jnp.float32), values.astype(jnp.float32)
    if values.shape[1] == 1:
        return weights * jnp.swapaxes(values, 1, 2)
    return jnp.einsum("bkmu,bukh->bkmh", weights, values)
