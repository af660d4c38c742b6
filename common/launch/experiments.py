"""What `reproduce` launchers are made of: trainings and measurements that are never done twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.checkpoint.store import load_params
from common.launch.workdir import write_atomically
from common.train import ModelParts, Task, TrainConfig, Trainer, TrainResult
from common.train.evaluate import EvalSets
from common.train.task import PureDict
from common.train.trainer import TrainBatches


class Stopped(Exception):
    """A signal stopped a training; its state is saved and the way to resume was printed."""


def trained(
    task: Task,
    config: TrainConfig,
    folder: Path,
    batches: TrainBatches,
    eval_sets: EvalSets | None = None,
    *,
    seed: int = 0,
    initial_params: Callable[[PureDict], PureDict] | None = None,
    resume_command: str | None = None,
) -> TrainResult:
    """Trains to the end from where `folder` stands; a finished training is not repeated.

    The arguments are the Trainer's.

    Raises:
      Stopped: a signal came first.
    """
    print(f"training in {folder}", flush=True)
    trainer = Trainer(
        task,
        config,
        folder,
        batches,
        eval_sets,
        seed=seed,
        initial_params=initial_params,
        resume_command=resume_command,
    )
    result = trainer.run()
    if result.preempted:
        raise Stopped
    return result


def load_trained(task: Task, folder: Path, seed: int) -> Any:
    """Returns the model that `trained` left in `folder`, on one device.

    The task may be another than that of the training, of a model with the same parameters.
    """
    parts = ModelParts(task, seed)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(parts.abstract_params)
    )
    params = load_params(folder / "checkpoints", abstract)
    return parts.merge(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params), {})


def measured(folder: Path, name: str, measure: Callable[[], Any]) -> Any:
    """Returns what `measure` gave in this or an earlier run, kept in `measurements/<name>.json`."""
    path = folder / "measurements" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measure(), indent=2, allow_nan=False) + "\n")
    else:
        print(f"{name}: measured before, see {path}", flush=True)
    return json.loads(path.read_text())
