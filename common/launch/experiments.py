"""What `reproduce` launchers are made of: trainings and measurements that are never done twice."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.checkpoint.store import load_params
from common.launch.report import Results
from common.launch.workdir import RunFolder, write_atomically
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


def conduct(
    config: Any,
    workdir: Path,
    measure: Callable[[RunFolder], dict[str, Any]],
    conclude: Callable[[dict[str, Any]], Results],
    write: Callable[[Path, Results], Path],
    headline: Callable[[Results], str],
) -> Results | None:
    """Measures in a run's folder, decides which outcomes came out, writes the report, tells.

    Args:
      config: kept in the folder.
      workdir: the folder.
      measure: returns what was found, by experiment; see `measured`.
      conclude: makes results of that.
      write: writes the report's folder and returns its page.
      headline: what came out, in half a sentence that follows how many outcomes did.

    Returns:
      The results; None if a signal stopped a training, which the same command resumes.

    Raises:
      UserError: the configuration or the folder does not fit. What was there stays.
    """
    folder = RunFolder(workdir)
    folder.open(config)
    start = time.perf_counter()
    try:
        found = measure(folder)
    except Stopped:
        return None
    finally:
        folder.close()
    results = conclude(found)
    page = write(folder.report, results)
    holds = results.holds.values()
    print(f"\n{results.claim}\n\n{results.setting}\n\n{results.summary()}\n")
    print(f"{time.perf_counter() - start:.0f} s; report: {page}")
    print(f"{sum(holds)} of {len(holds)} expected outcomes came out; {headline(results)}")
    return results
