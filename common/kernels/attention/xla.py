"""Attention in plain XLA, in one of two forms.

`direct` holds all scores of the call at once: best while they are few. `blocked` walks over tiles
of queries and keys with a running softmax and never visits a tile that the causal bound or the
window excludes, so that local attention costs O(T * window) work and memory.
"""

from types import ModuleType

import jax

from common.kernels.attention import blocked, direct
from common.kernels.attention.options import Options

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
    return _form(options, q, k).forward(options, q, k, v, mask, segments, offset)


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
    form = _form(options, q, k)
    return form.backward(options, q, k, v, mask, segments, offset, log_sum, delta, d_out)


def _form(options: Options, q: jax.Array, k: jax.Array) -> ModuleType:
    """Picks the module by static shape, as measured on a CPU.

    Tiles pay when they skip three tenths of the pairs, padding counted, or four tenths of few.
    Where they skip less they pay for their memory alone, from some tens of megabytes of scores on.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    tiles = blocked.tiling(options, queries, keys)
    if queries <= tiles.block_q or keys <= 128:
        return direct
    if tiles.block_k == keys:
        return blocked if q.size // q.shape[-1] * keys > 2**23 else direct
    return blocked if queries * keys >= 512 * 512 or tiles.work() <= 0.6 else direct
