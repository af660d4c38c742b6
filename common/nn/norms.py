"""Root-mean-square normalisation in fp32."""

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
