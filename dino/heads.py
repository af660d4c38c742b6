"""Projection heads: an MLP to a narrow unit vector, and its cosines with many prototypes."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.nn.linear import Linear, tied_product
from common.nn.mlp import gelu_exact
from common.nn.param import ones, param
from common.sharding import shard

_INIT = jax.nn.initializers.normal(0.02)  # The paper cuts it at 2, a hundred deviations away.
_SMALLEST_NORM = 1e-12


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Shape of a head (section 2.8).

    Attributes:
      prototypes: K, number of logits.
      bottleneck: width of the unit vector before the prototypes.
      hidden: width of the MLP's two hidden layers.
    """

    prototypes: int = 65_536
    bottleneck: int = 256
    hidden: int = 2048

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"a head's {field.name} must be at least 1")


class ProjectionHead(nnx.Module):
    """Three linear layers with exact GELU, then weight-normalised `Prototypes`."""

    def __init__(
        self,
        width: int,
        config: HeadConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Linear:
            return Linear(
                inputs, outputs, axes=axes, use_bias=True, init=_INIT, dtype=dtype, rngs=rngs
            )

        hidden = config.hidden
        self.mlp = nnx.List(
            [
                linear(width, hidden, ("embed", "mlp")),
                linear(hidden, hidden, ("mlp", "embed")),
                linear(hidden, config.bottleneck, ("embed", None)),
            ]
        )
        self.last_layer = Prototypes(config, dtype=dtype, rngs=rngs)

    def bottleneck(self, x: jax.Array) -> jax.Array:
        """Features `[..., D]` to unit vectors `[..., bottleneck]`, fp32."""
        first, second, third = self.mlp
        x = gelu_exact(first(x))
        x = gelu_exact(second(x))
        return unit(third(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features `[..., D]` to logits `[..., K]`, fp32."""
        return self.last_layer(self.bottleneck(x))


class Prototypes(nnx.Module):
    """`z · g_k v_k / |v_k|` for K prototypes; both `g` and `v` train, and are averaged apart."""

    def __init__(
        self, config: HeadConfig, *, dtype: jax.typing.DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        count, width = config.prototypes, config.bottleneck
        self.weight_g = param(rngs, ones, (count,), ("prototypes",))
        self.weight_v = param(rngs, _uniform(width**-0.5), (count, width), ("prototypes", None))
        self.dtype = jnp.dtype(dtype)

    def table(self) -> jax.Array:
        """`[K, bottleneck]`: the prototypes as they are multiplied, in the compute dtype."""
        table = self.weight_g[...].astype(jnp.float32)[:, None] * unit(self.weight_v[...])
        return shard(table.astype(self.dtype), "vocab", None)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Unit vectors `[..., bottleneck]` to logits `[..., K]`, fp32."""
        return logits_of(z, self.table())


def logits_of(z: jax.Array, table: jax.Array) -> jax.Array:
    """`z [..., d]` times `table [K, d]`: `[..., K]` fp32, by operands of the table's dtype."""
    middle = (None,) * (z.ndim - 2)
    return shard(tied_product(z, table, table.dtype), "batch", *middle, "vocab")


def unit(x: jax.Array) -> jax.Array:
    """`x / |x|` along the last axis, fp32; a zero vector stays one and has a gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM**2))


def _uniform(bound: float):
    """Torch's default for a linear layer: uniform up to `bound` on both sides."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
