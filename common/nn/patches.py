"""Images cut into square patches, each a linear map of its pixels."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.nn.linear import product
from common.nn.param import param
from common.sharding import shard


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Returns how many patches an image has, down and across.

    Raises:
      UserError: a side is no multiple of the patch; the message names sizes that are.
    """
    if height % patch_size or width % patch_size or not height or not width:
        smaller = tuple(max(n // patch_size, 1) * patch_size for n in (height, width))
        larger = tuple(-(-n // patch_size) * patch_size for n in (height, width))
        raise UserError(
            f"images of {height} x {width} are no multiples of the patch size {patch_size}: "
            f"resize them to {smaller[0]} x {smaller[1]} or pad them to {larger[0]} x {larger[1]}"
        )
    return height // patch_size, width // patch_size


def patches_of(images: jax.Array, patch_size: int) -> jax.Array:
    """`[B, H, W, C] -> [B, N, p p C]`: patches row by row, each row by row, channels last."""
    height, width = images.shape[1:3]
    rows, columns = patch_grid(height, width, patch_size)
    cut = images.reshape(-1, rows, patch_size, columns, patch_size, images.shape[-1])
    return jnp.swapaxes(cut, 2, 3).reshape(images.shape[0], rows * columns, -1)


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel's size, as the matrix product it is.

    `kernel [p p C, D]` takes a patch's pixels row by row, channels last.
    """

    def __init__(
        self,
        patch_size: int,
        channels: int,
        width: int,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inputs = patch_size * patch_size * channels

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            bound = inputs**-0.5  # What torch gives a convolution.
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.kernel = param(rngs, uniform, (inputs, width), (None, "embed"))
        self.bias = param(rngs, uniform, (width,), (None,))
        self.patch_size = patch_size
        self.dtype = jnp.dtype(dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, N, D]` fp32."""
        pixels = shard(patches_of(images, self.patch_size), "batch", "seq", None)
        x = product(pixels, self.kernel[...], self.dtype)
        return x + self.bias[...].astype(jnp.float32)
