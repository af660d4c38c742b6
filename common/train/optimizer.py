"""From an `OptimizerConfig` to an optax transformation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common.errors import UserError, nearest
from common.train.schedules import make_schedule

OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: `adamw`, `adafactor`, `lion` or `sgd` (momentum `b1`).
      learning_rate: peak rate.
      warmup_steps: updates of linear rise to the peak.
      schedule: `cosine`, `linear`, `constant` or `wsd`.
      final_fraction: last rate as a fraction of the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, times the learning rate, of parameters the task lets decay.
      clip_norm: largest global norm of the gradient; None clips nothing.
      moment_dtype: dtype of the first moment; the second stays in the parameters' dtype.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    moment_dtype: str = "float32"


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the updates made before, for a run of `steps`."""
    return make_schedule(
        config.schedule, config.learning_rate, steps, config.warmup_steps, config.final_fraction
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, decay_mask: Any, trains_from: Any = None
) -> optax.GradientTransformation:
    """Returns clipping, moments, decay and learning rate as one transformation.

    Args:
      config: what to build.
      steps: length of the run in updates, where the schedule ends.
      decay_mask: tree of bool, shaped like the trained parameters: which of them decay.
      trains_from: tree of int likewise: after how many updates each begins to change; None: all at
        once.

    Raises:
      UserError: a field is out of range.
    """
    _check(config)
    rate = learning_rate(config, steps)
    dtype = config.moment_dtype
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    parts: dict[str, list[optax.GradientTransformation]] = {
        "adamw": [optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype), decay],
        "lion": [optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype), decay],
        "sgd": [decay, optax.trace(config.b1, accumulator_dtype=dtype)],
        "adafactor": [
            optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
            optax.clip_by_block_rms(1.0),
            decay,
        ],
    }
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    held = [_held_back(trains_from)] if any(jax.tree.leaves(trains_from)) else []
    return optax.chain(*clip, *parts[config.name], optax.scale_by_learning_rate(rate), *held)


def _held_back(trains_from: Any) -> optax.GradientTransformation:
    """Leaves out each parameter's updates before its time: it stays as it is, bit for bit."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        kept = jax.tree.map(
            lambda update, first: jnp.where(state.count >= first, update, 0), updates, trains_from
        )
        return kept, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _check(config: OptimizerConfig) -> None:
    if config.name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer '{config.name}'{nearest(config.name, OPTIMIZERS)}")
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise UserError(f"optimizer.clip_norm must be positive or None, not {config.clip_norm}")
    if config.learning_rate < 0 or config.weight_decay < 0:
        raise UserError("optimizer.learning_rate and weight_decay must not be negative")
    if not (0 <= config.b1 < 1 and 0 <= config.b2 < 1):
        raise UserError(f"optimizer.b1 and b2 must lie in [0, 1); got {config.b1}, {config.b2}")
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise UserError(
            f"optimizer.moment_dtype must be float32 or bfloat16, not '{config.moment_dtype}'"
        )
