"""Rotary position embedding on all or on the first part of each head."""

import jax
import jax.numpy as jnp


def rope(
    x: jax.Array, positions: jax.Array, *, base: float = 10_000.0, fraction: float = 1.0
) -> jax.Array:
    """Rotates the first `fraction` of each head; the rest passes through.

    Within the rotated part of width r, dimension j is paired with j + r/2 and turned by
    `position * base^(-2j / r)`. The product stays in fp32; the result has x's dtype.

    Args:
      x: `[B, T, N, h]`.
      positions: `[B, T]` int32 (or broadcastable to it).
      base: wavelength base.
      fraction: rotated share of the head dimension (RecurrentGemma rotates one half).
    """
    rotated = int(x.shape[-1] * fraction)
    half = rotated // 2
    exponent = jnp.arange(half, dtype=jnp.float32) * (2.0 / rotated)
    angles = positions[..., None].astype(jnp.float32) * base**-exponent  # [B, T, r/2]
    sin, cos = jnp.sin(angles)[..., None, :], jnp.cos(angles)[..., None, :]
    x32 = x.astype(jnp.float32)
    first, second = x32[..., :half], x32[..., half:rotated]
    parts = [first * cos - second * sin, second * cos + first * sin, x32[..., rotated:]]
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
