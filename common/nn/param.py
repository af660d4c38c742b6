"""Parameters that know the logical name of each of their dimensions.

The names ("embed", "mlp", "heads", ...) are plain metadata under the key `axes`. `common.sharding`
maps them to mesh axes; nothing here needs a mesh. A leaf that was stacked over layers has one
leading dimension more than it has names.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[..., jax.Array]
Axes = Sequence[str | None]

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def param(
    rngs: nnx.Rngs,
    init: Initializer,
    shape: Sequence[int],
    axes: Axes,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> nnx.Param:
    """Draws one parameter and labels its dimensions.

    Args:
      rngs: source of the `params` key.
      init: a `jax.nn.initializers` style function `(key, shape, dtype) -> array`.
      shape: the parameter's shape.
      axes: one logical name (or None: never sharded) for each dimension of `shape`.
      dtype: storage type; computation may cast.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(shape)} dimensions but {len(axes)} axis names: {shape}, {axes}")
    return nnx.Param(init(rngs.params(), tuple(shape), dtype), axes=tuple(axes))


def fan_in_normal(
    scale: float = 1.0, *, in_axis: int = -2, batch_axis: Sequence[int] = ()
) -> Initializer:
    """Normal with variance `scale / fan_in`, untruncated (Griffin's and RecurrentGemma's choice).

    Args:
      scale: numerator of the variance.
      in_axis: the input dimension; the last one is the output.
      batch_axis: dimensions that count independent maps, not inputs.
    """
    return jax.nn.initializers.variance_scaling(
        scale, "fan_in", "normal", in_axis=in_axis, batch_axis=tuple(batch_axis)
    )
