"""Normalisation over the last dimension, in fp32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.param import ones, param, zeros


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, the scale stored around 0 (Gemma) or 1 (Llama)."""

    def __init__(
        self,
        width: int,
        *,
        epsilon: float = 1e-6,
        zero_centred: bool = True,
        rngs: nnx.Rngs,
    ):
        self.scale = param(rngs, zeros if zero_centred else ones, (width,), (None,))
        self.epsilon = epsilon
        self.zero_centred = zero_centred

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`: the mean and the product in fp32, the result in x's dtype."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32) + (1.0 if self.zero_centred else 0.0)
        return (x32 * inverse * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias`, over the last dimension."""

    def __init__(self, width: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (width,), (None,))
        self.bias = param(rngs, zeros, (width,), (None,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`: statistics and products in fp32, the result in x's dtype."""
        return _layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.checkpoint, static_argnums=(3,), prevent_cse=False)
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`LayerNorm`, of which the backward pass finds x alone, and not three arrays of its size."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
