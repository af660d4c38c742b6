"""What a kernel reads, rounded up to whole blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.kernels.attention.cut import Cut


class Operands(NamedTuple):
    """Operands of a kernel; also the specs and the references of them. None: not given.

    Attributes:
      q, d_out: `[B, K, G, T, h]`.
      k, v: `[B, K, S, h]`.
      mask: int8, `[B|1, K|1, G|1, T|1, S|1]`.
      query_segments, key_segments: `[B, 1, T]`, `[B, 1, S]`.
      log_sum, delta: `[B, K, G, 1, T]`.
    """

    q: Any
    k: Any
    v: Any
    mask: Any
    query_segments: Any
    key_segments: Any
    log_sum: Any = None
    delta: Any = None
    d_out: Any = None


def padded(
    cut: Cut,
    width: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    log_sum: jax.Array | None = None,
    delta: jax.Array | None = None,
    d_out: jax.Array | None = None,
) -> Operands:
    """Pads with zeros to the blocks of `cut` and to heads of `width`.

    Keys beyond S must be masked; queries beyond T change no gradient, their `d_out` being zero.
    """

    def heads(x: jax.Array | None, block: int) -> jax.Array | None:
        return None if x is None else round_up(round_up(x, -1, width), -2, block)

    def row(x: jax.Array | None, block: int) -> jax.Array | None:
        return None if x is None else round_up(x, -1, block)[..., None, :]

    if mask is not None:
        mask = mask.astype(jnp.int8)
        mask = mask if mask.shape[-2] == 1 else round_up(mask, -2, cut.block_q)
        mask = mask if mask.shape[-1] == 1 else round_up(mask, -1, cut.block_k)
    query_segments, key_segments = (None, None) if segments is None else segments
    return Operands(
        heads(q, cut.block_q),
        heads(k, cut.block_k),
        heads(v, cut.block_k),
        mask,
        row(query_segments, cut.block_q),
        row(key_segments, cut.block_k),
        row(log_sum, cut.block_q),
        row(delta, cut.block_q),
        heads(d_out, cut.block_q),
    )


def round_up(array: jax.Array, axis: int, block: int) -> jax.Array:
    """Pads one axis with zeros to a multiple of `block`."""
    missing = -array.shape[axis] % block
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)
