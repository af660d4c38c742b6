"""Feature extraction as a program to compile before there is a device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.vit import ViT, ViTConfig
from common.sharding import DEFAULT_RULES, MeshConfig, batch_sharding, make_mesh, state_shardings
from common.sharding.program import Program
from dino.model import features_of


def features_program(
    config: ViTConfig, devices: Sequence[jax.Device], rows: int, size: int | None = None
) -> Program:
    """Features of the last block of `rows` square images, divided among all devices.

    Every device has all parameters, in the compute dtype.

    Args:
      config: of the backbone.
      devices: of a topology.
      rows: images of a batch.
      size: their sides in pixels; None: what the position table is for.
    """
    size = config.image_size if size is None else size
    mesh = make_mesh(MeshConfig(), devices)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype), sharding=s),
        nnx.to_pure_dict(state),
        state_shardings(state, mesh, DEFAULT_RULES),
    )
    nnx.replace_by_pure_dict(state, placed)
    shape = (rows, size, size, config.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
    return Program(
        function=features_of,
        arguments=(graphdef, state, images, 1, True),
        holds={"parameters": state, "batch": images},
        mesh=mesh,
        flops=rows * config.flops(size, size),
        items=rows,
        shape=f"{rows} images of {size} × {size}",
        unit="images",
    )
