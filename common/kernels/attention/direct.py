"""Attention with all scores of the call in memory at once; for short sequences."""

import jax
import jax.numpy as jnp

from common.kernels.attention import tile
from common.kernels.attention.options import Options, allowed_pairs

_Segments = tuple[jax.Array, jax.Array]


def forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    offset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[B, K, G, T, h]` and the log-sum `[B, K, G, T]`."""
    allowed = allowed_pairs(options, mask, segments, offset, q.shape[-2], k.shape[-2])
    scores = tile.scores_of_rows(options, tile.rows_of(q), k, allowed, q.shape[-2])
    maximum = tile.finite(jnp.max(scores, axis=-1))
    total, weighted = tile.weighted_sum(jnp.exp(scores - maximum[..., None]), v)
    out, log_sum = tile.normalise(total, weighted, q.dtype), tile.log_sum_of(total, maximum)
    return out.reshape(q.shape), log_sum.reshape(q.shape[:-1])


def backward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    offset: jax.Array | None,
    log_sum: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(dq, dk, dv)`."""
    allowed = allowed_pairs(options, mask, segments, offset, q.shape[-2], k.shape[-2])
    dq, dk, dv = tile.gradients(options, (q, k, v), allowed, log_sum, delta, d_out)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
