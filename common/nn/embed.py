"""Token embedding tied to the output head."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.nn.linear import tied_product
from common.nn.param import param
from common.nn.table import look_up
from common.sharding import shard


class Embedding(nnx.Module):
    """`table [V, D]`: rows on the way in, the same rows as output head on the way out.

    A head of its own is a second one, of which only `decode` is called.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        scale_by_sqrt_width: bool = False,
        scale_dtype: jax.typing.DTypeLike = jnp.bfloat16,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.normal(width**-0.5)
        self.table = param(rngs, init, (vocab_size, width), ("vocab", "embed"))
        self.dtype = jnp.dtype(dtype)
        # RecurrentGemma's is rounded to bfloat16 whatever the compute dtype: sqrt(2560) is 50.5.
        factor = np.asarray(width**0.5, scale_dtype) if scale_by_sqrt_width else 1.0
        self.factor = float(factor)

    def encode(self, tokens: jax.Array) -> jax.Array:
        """`[B, L] int -> [B, L, D]` in the compute dtype."""
        x = look_up(self.table[...], tokens, self.dtype)
        return x if self.factor == 1.0 else x * jnp.asarray(self.factor, self.dtype)

    def decode(self, x: jax.Array) -> jax.Array:
        """`[B, L, D] -> [B, L, V]` logits in fp32, or `[B, D] -> [B, V]`."""
        axes = ("batch", "seq", "vocab") if x.ndim == 3 else ("batch", "vocab")
        return shard(tied_product(x, self.table[...], self.dtype), *axes)
