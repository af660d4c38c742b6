"""The training step as a program to compile before there is a device."""

from collections.abc import Mapping, Sequence

import jax

from common.sharding import batch_sharding, make_mesh
from common.sharding.program import Program
from common.train.optimizer import learning_rate
from common.train.state import ModelParts, abstract_train_state
from common.train.step import make_train_step
from common.train.task import Task
from common.train.trainer import TrainConfig, check_config


def train_program(
    task: Task,
    config: TrainConfig,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    devices: Sequence[jax.Device],
    *,
    shape: str,
    items: int,
    recomputed_flops: float = 0.0,
    seed: int = 0,
) -> Program:
    """Returns the step that the `Trainer` would run, over the mesh of `config` on `devices`.

    Args:
      task, config, seed: as the Trainer gets them.
      batch: the global batch's arrays.
      devices: of a topology.
      shape, items: see `Program`.
      recomputed_flops: what rematerialisation adds to the task's `flops_per_step`.

    Raises:
      UserError: mesh, batch and devices do not fit.
    """
    mesh = make_mesh(config.mesh, devices)
    check_config(config, mesh)
    parts = ModelParts(task, seed)
    optimizer = parts.optimizer(config.optimizer, config.steps)
    abstract = abstract_train_state(parts, optimizer, mesh)
    step = make_train_step(
        parts,
        optimizer,
        learning_rate(config.optimizer, config.steps),
        mesh,
        abstract,
        seed=seed,
        accumulation=config.accumulation,
        log_param_norm=config.log_param_norm,
    )
    rows = batch_sharding(mesh)
    placed = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch.items()
    }
    return Program(
        function=step,
        arguments=(abstract, placed),
        holds={
            "parameters": abstract.params,
            "optimizer": abstract.opt_state,
            "other state": (abstract.rest, abstract.extra),
            "batch": placed,
        },
        mesh=mesh,
        rules=task.rules,
        flops=task.flops_per_step(batch) or 0.0,
        recomputed_flops=recomputed_flops,
        items=items,
        shape=shape,
        unit=task.unit,
    )
