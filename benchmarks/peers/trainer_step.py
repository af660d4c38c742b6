"""Our side of every model's training benchmark: the step that the trainer compiles."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.contender import Run
from common.sharding import MeshConfig, make_mesh
from common.train import Batch, Task
from common.train.optimizer import OptimizerConfig, learning_rate
from common.train.state import ModelParts, abstract_train_state, init_state, shardings_of
from common.train.step import make_train_step

_STEPS = 10_000


def trainer_step(
    task: Task, params: dict[str, Any], batch: Batch, settings: OptimizerConfig | None = None
) -> Run:
    """Returns one step of AdamW on `batch`, from a copy of `params`."""
    parts = ModelParts(task, seed=0)
    settings = settings or OptimizerConfig(schedule="constant")
    optimizer = parts.optimizer(settings, _STEPS)
    # One device: the peers know no other.
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    abstract = abstract_train_state(parts, optimizer, mesh)
    step = make_train_step(parts, optimizer, learning_rate(settings, _STEPS), mesh, abstract)
    # As the trainer begins: the step compiles once. It takes the parameters over.
    first = jax.jit(
        lambda params: init_state(parts, optimizer, params),
        out_shardings=shardings_of(abstract),
        donate_argnums=0,
    )
    state = first(jax.tree.map(jnp.copy, params))

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run
