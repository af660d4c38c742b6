"""What `python -m common.plan` compiles of DINOv2: the training step, and features."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from common.generate.ahead import place_parameters
from common.sharding import DEFAULT_RULES, batch_sharding
from common.sharding.program import Inference, Program
from common.train.ahead import train_program
from dino import model as features
from dino.config import BackboneConfig
from dino.data import batch_shapes
from dino.flops import Views, heads_flops, student_flops, views_in
from dino.model import Backbone
from dino.presets import PRESETS as PRESETS
from dino.presets import Config, training
from dino.train import make_task


def programs(
    config: Config, devices: Sequence[jax.Device], inference: Inference
) -> Mapping[str, Callable[[], Program]]:
    """Returns the programs by name; each is made when it is asked for.

    "features" are the class token and patches of images of the size that the run's global crops
    have, the parameters whole on every device unless `inference` says otherwise.
    """
    return {
        "train": lambda: _train(config, devices),
        "features": lambda: _features(config, devices, inference),
    }


def _train(config: Config, devices: Sequence[jax.Device]) -> Program:
    crops, rows = config.data.crops, config.train.batch_size
    batch = batch_shapes(config.data, config.model.backbone.patch_size, rows)
    views = f"2 × {crops.global_size}² + {crops.local_crops} × {crops.local_size}²"
    return train_program(
        make_task(config),
        training(config),
        batch,
        devices,
        shape=f"{rows} images of {views} pixels",
        items=rows,
        recomputed_flops=_recomputed_flops(config, views_in(batch)),
        seed=config.seed,
    )


def _recomputed_flops(config: Config, views: Views) -> float:
    """What the backward pass does again: the student's blocks under full remat, heads in parts."""
    heads = views.images * heads_flops(config.model, 2 + views.local_views, views.patches)
    blocks = student_flops(config.model, views) - heads
    again = blocks if config.model.backbone.remat == "full" else 0.0
    return again + (heads if config.objective.loss_chunk is not None else 0.0)


def _features(config: Config, devices: Sequence[jax.Device], inference: Inference) -> Program:
    vit, rows = config.model.backbone, inference.rows
    mesh = dataclasses.replace(inference, tensor=inference.tensor or 1).mesh(devices, vit.num_heads)
    backbone = BackboneConfig(dataclasses.replace(vit, drop_path=0.0, remat="none"))
    model = nnx.eval_shape(lambda: Backbone(backbone, rngs=nnx.Rngs(0)))
    graphdef, state = place_parameters(model, jnp.dtype(vit.dtype), mesh)
    size = config.data.crops.global_size
    whole = rows % mesh.shape["data"] != 0
    placed = None if whole else batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((rows, size, size, vit.channels), jnp.float32, sharding=placed)
    return Program(
        function=features.features_of,
        arguments=(graphdef, state, images, 1, True),
        holds={"parameters": state, "batch": images},
        flops=rows * vit.flops(size, size),
        items=rows,
        shape=f"{rows} images of {size}² pixels",
        unit="images",
        mesh=mesh,
        rules=DEFAULT_RULES,
    )
