"""A backbone to take features from: a vision transformer, compiled once for each size of image."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.vit import Tokens, ViT
from dino.config import BackboneConfig


class Backbone(ViT):
    """DINOv2's backbone. `features` and `attention_maps` compile for each shape they meet."""

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        super().__init__(config.vit, rngs=rngs)
        self.backbone_config = config

    def features(
        self, images: jax.Array, layers: int | Sequence[int] = 1, norm: bool = True
    ) -> Tokens:
        """What one block or several make of images.

        Args:
          images: `[B, H, W, 3]` floating, normalised (`normalize`); H and W are multiples of the
            patch size, any others than the model was trained with included.
          layers: 1: the last block. n: the last n blocks. A sequence: the blocks of these numbers,
            counted from 0, or from the end if negative.
          norm: apply the final norm to each; otherwise they are what the block puts out.

        Returns:
          `cls [B, D]`, `registers [B, R, D]`, `patches [B, N, D]` (row by row) for `layers=1`;
          else tuples of them, in order of depth.

        Raises:
          UserError: images of another kind or size, or no such block.
        """
        self._check(images)
        chosen = layers if isinstance(layers, int) else tuple(layers)
        graphdef, state = _parts(self)
        return features_of(graphdef, state, images, chosen, norm)

    def attention_maps(self, images: jax.Array, block: int = -1) -> jax.Array:
        """What each token's query takes of each token: `[B, heads, T, T]` fp32, T = 1 + R + N.

        Tokens stand in the order class token, registers, patches; row 0 without its first 1 + R
        columns is where the class token looks.

        Args:
          images: `[B, H, W, 3]`, as for `features`.
          block: number of the block, counted from the end if negative.
        """
        self._check(images)
        graphdef, state = nnx.split(self)
        return _attention_maps(graphdef, state, images, block)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images `[..., 3]` from 0 to 255 -> fp32, by the mean and deviation of the weights."""
        mean = 255 * jnp.asarray(self.backbone_config.image_mean, jnp.float32)
        std = 255 * jnp.asarray(self.backbone_config.image_std, jnp.float32)
        return (images.astype(jnp.float32) - mean) / std

    def _check(self, images: jax.Array) -> None:
        channels = self.config.channels
        if images.ndim != 4 or images.shape[-1] != channels:
            raise UserError(
                f"images must be [B, H, W, {channels}], not {list(images.shape)}: channels come "
                "last, and a single image is a batch of one"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are {images.dtype}: pass them through normalize(images), which takes "
                "values from 0 to 255"
            )


# Backbones taken apart, with the arrays that they had then.
_unrolled: weakref.WeakKeyDictionary[Backbone, tuple[list[jax.Array], Any, Any]]
_unrolled = weakref.WeakKeyDictionary()


def _parts(model: Backbone) -> tuple[Any, Any]:
    """Graph and state of a backbone; on a CPU with arrays of its own for every block.

    A CPU copies each block's weights out of a stack before it multiplies by them. The copies that
    it is given instead are made once, and again when a parameter is another array.
    """
    graphdef, state = nnx.split(model)
    leaves = jax.tree.leaves(state)
    if any(isinstance(x, jax.core.Tracer) or not _on_cpu(x) for x in leaves):
        return graphdef, state
    before = _unrolled.get(model)
    if before is None or any(x is not y for x, y in zip(leaves, before[0], strict=True)):
        before = _unrolled[model] = (leaves, *nnx.split(model.unrolled()))
    return before[1:]


def _on_cpu(x: Any) -> bool:
    return isinstance(x, jax.Array) and all(d.platform == "cpu" for d in x.devices())


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def features_of(graphdef, state, images, layers, norm: bool) -> Tokens:
    """`Backbone.features` of a backbone in parts; `layers` and `norm` are static."""
    return ViT.features(nnx.merge(graphdef, state), images, layers, norm)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _attention_maps(graphdef, state, images, block: int) -> jax.Array:
    return ViT.attention_maps(nnx.merge(graphdef, state), images, block)
