"""Attention in plain XLA, with a gradient that recomputes the probabilities.

Two forms share one custom gradient, which keeps only the output and the log of the softmax's
denominator. `direct` holds all scores of the call at once: best while they fit in cache. `blocked`
walks over tiles of queries and keys with a running softmax and never visits a tile that the causal
bound or the window excludes, so that local attention costs O(T * window) work and memory.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from common.kernels.attention import blocked, direct
from common.kernels.attention.options import Options

_Segments = tuple[jax.Array, jax.Array]


def attention(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> jax.Array:
    """Returns `[B, K, G, T, h]` from q `[B, K, G, T, h]` and k, v `[B, K, S, h]`."""
    return _attention(options, q, k, v, mask, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> jax.Array:
    out, _ = _form(options, q, k).forward(options, q, k, v, mask, segments)
    return out


def _attention_fwd(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> tuple[jax.Array, tuple]:
    out, log_sum = _form(options, q, k).forward(options, q, k, v, mask, segments)
    return out, (q, k, v, mask, segments, out, log_sum)


def _attention_bwd(options: Options, residuals: tuple, d_out: jax.Array) -> tuple:
    q, k, v, mask, segments, out, log_sum = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq, dk, dv = _form(options, q, k).backward(
        options, q, k, v, mask, segments, log_sum, delta, d_out
    )
    return dq, dk, dv, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _form(options: Options, q: jax.Array, k: jax.Array) -> ModuleType:
    """Picks the module by static shape, as measured on a CPU.

    Tiles pay when they skip a fifth of the pairs, padding counted, and from about 512 x 512 pairs
    on for their use of the cache.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    tiles = blocked.tiling(options, queries, keys)
    if queries <= tiles.block or keys <= tiles.block:
        return direct
    large = queries * keys >= 512 * 512
    return blocked if tiles.work() <= (1.3 if large else 0.8) else direct
