"""Rotary position embedding on all or on the first part of each head."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are lowered for texts longer than those of the first training.

    Attributes:
      kind: "linear" divides all of them by `factor`; "llama3" divides those whose wavelength is
        above `original_length / low_frequency_factor`, keeps those whose wavelength is below
        `original_length / high_frequency_factor`, and goes smoothly from one to the other.
      factor: how many times longer the texts become.
      low_frequency_factor, high_frequency_factor: of "llama3".
      original_length: longest text of the first training; of "llama3".
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"a rope scaling needs a positive factor, not {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                "a rope scaling needs 0 < low_frequency_factor < high_frequency_factor, not "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )

    def __call__(self, frequencies: jax.Array) -> jax.Array:
        """`[r/2] -> [r/2]`, radians per token."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


def rope(
    x: jax.Array,
    positions: jax.Array,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Rotates the first `fraction` of each head; the rest passes through.

    Within the rotated part of width r, dimension j is paired with j + r/2 and turned by
    `position * base^(-2j / r)`. The product stays in fp32; the result has x's dtype.

    Args:
      x: `[B, T, N, h]`.
      positions: `[B, T]` int32 (or broadcastable to it).
      base: wavelength base.
      fraction: rotated share of the head dimension (RecurrentGemma rotates one half).
      scaling: changes the frequencies `base^(-2j / r)`.
    """
    rotated = int(x.shape[-1] * fraction)
    half = rotated // 2
    exponent = jnp.arange(half, dtype=jnp.float32) * (2.0 / rotated)
    frequencies = base**-exponent
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, r/2]
    sin, cos = jnp.sin(angles)[..., None, :], jnp.cos(angles)[..., None, :]
    x32 = x.astype(jnp.float32)
    first, second = x32[..., :half], x32[..., half:rotated]
    parts = [first * cos - second * sin, second * cos + first * sin, x32[..., rotated:]]
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
