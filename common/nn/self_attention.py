"""Attention of a set of tokens to itself: all see all, unless a mask says otherwise."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels import attention
from common.nn.linear import Linear, product
from common.nn.param import Initializer, fan_in_normal, param, zeros
from common.sharding import per_shard, shard

# Logical axes of queries and of keys `[B, T, H, h]`.
QUERIES = ("batch", "seq", "heads", None)
KEYS = ("batch", None, "heads", None)


class SelfAttention(nnx.Module):
    """Multi-head attention without positions of its own, as vision transformers have it.

    Queries, keys and values are one `kernel [D, 3, D]`, in this order, so that they are one matrix
    product and the heads can still be divided among devices.

    Args:
      width: D.
      num_heads: H; the width of a head is D / H.
      use_bias: biases of all projections.
      init: of both kernels.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        use_bias: bool = True,
        init: Initializer | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inward = init or fan_in_normal(in_axis=0, batch_axis=(1,))
        self.qkv = param(rngs, inward, (width, 3, width), ("embed", None, "heads"))
        self.qkv_bias = param(rngs, zeros, (3, width), (None, "heads")) if use_bias else None
        self.out = Linear(
            width,
            width,
            axes=("heads", "embed"),
            use_bias=use_bias,
            init=init,
            dtype=dtype,
            rngs=rngs,
        )
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`.

        Args:
          x: the tokens.
          mask: bool, broadcastable to `[B, H, T, T]`, True where a query may see a key.
        """
        q, k, v = self._heads(x)
        axes = None
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            names = ("batch", "heads", "seq", None)
            axes = tuple(n if size > 1 else None for n, size in zip(names, mask.shape))

        def local(q, k, v, mask, *, axis_name: str | None) -> jax.Array:
            return attention(q, k, v, mask=mask)

        out = per_shard(
            local, (q, k, v, mask), (QUERIES, KEYS, KEYS, axes), QUERIES, sequence="seq"
        )
        return self.out(out.reshape(x.shape))

    def weights(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """What each query takes of each key: `[B, T, D] -> [B, H, T, T]` fp32, rows add up to 1.

        For looking at; `__call__` never holds them.
        """
        q, k, _ = self._heads(x)
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        scores = scores * self.head_dim**-0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1)

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each `[B, T, H, h]`."""
        three = product(x, self.qkv[...], self.dtype)  # [B, T, 3, D] fp32
        if self.qkv_bias is not None:
            three = three + self.qkv_bias[...].astype(jnp.float32)
        three = three.astype(self.dtype)
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (shard(three[:, :, n].reshape(shape), *QUERIES) for n in range(3))
        return q, k, v
