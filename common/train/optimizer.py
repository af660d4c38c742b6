"""From an `OptimizerConfig` to an optax transformation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.errors import UserError, nearest
from common.train.schedules import half_cosine, make_schedule

OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: `adamw`, `adafactor`, `lion` or `sgd` (momentum `b1`).
      learning_rate: peak rate.
      warmup_steps: updates of linear rise to the peak.
      warmup_from_zero: the first update of the rise has rate 0 and its last the peak, see
        `make_schedule`.
      schedule: `cosine`, `linear`, `constant` or `wsd`.
      final_fraction: last rate as a fraction of the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, times the learning rate, of parameters the task lets decay.
      final_weight_decay: what the decay becomes by the end of the run, on half a cosine; None: it
        stays.
      clip_norm: largest global norm of the gradient, or of each group of parameters that the task
        clips by itself; None clips nothing.
      moment_dtype: dtype of the first moment; the second stays in the parameters' dtype.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    warmup_from_zero: bool = False
    schedule: str = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    final_weight_decay: float | None = None
    clip_norm: float | None = 1.0
    moment_dtype: str = "float32"


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the updates made before, for a run of `steps`."""
    return make_schedule(
        config.schedule,
        config.learning_rate,
        steps,
        config.warmup_steps,
        config.final_fraction,
        warmup_from_zero=config.warmup_from_zero,
    )


def weight_decay(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the weight decay as a function of the updates made before, for a run of `steps`."""
    if config.final_weight_decay is None:
        return optax.constant_schedule(config.weight_decay)
    return half_cosine(config.weight_decay, config.final_weight_decay, steps)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    decay_mask: Any,
    trains_from: Any = None,
    *,
    rates: Any = None,
    clip_groups: Any = None,
) -> optax.GradientTransformation:
    """Returns clipping, moments, decay and learning rate as one transformation.

    Where it clips, its `update` takes the gradients' global norm as `norm`, if that is known.

    Args:
      config: what to build.
      steps: length of the run in updates, where the schedule ends.
      decay_mask: tree of bool, shaped like the trained parameters: which of them decay.
      trains_from: tree of int likewise: after how many updates each begins to change; None: all at
        once.
      rates: tree of factors of the learning rate likewise (and so of the decay), each a number or
        an array that broadcasts to its parameter; None: 1 for all.
      clip_groups: tree of names likewise: gradients of one name are clipped together; None: all.

    Raises:
      UserError: a field is out of range.
    """
    _check(config)
    rate = learning_rate(config, steps)
    dtype = config.moment_dtype
    decay = _decay(config, steps, decay_mask)
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
    clip = [] if config.clip_norm is None else [_clip(config.clip_norm, clip_groups)]
    scaled = [_scale_each(rates)] if _any_differs(rates) else []
    held = [_held_back(trains_from)] if any(jax.tree.leaves(trains_from)) else []
    scale = optax.scale_by_learning_rate(rate)
    return optax.chain(*clip, *parts[config.name], *scaled, scale, *held)


def _decay(config: OptimizerConfig, steps: int, mask: Any) -> optax.GradientTransformation:
    """Adds the decayed parameters to the updates."""
    if config.final_weight_decay is None:
        return optax.add_decayed_weights(config.weight_decay, mask=mask)
    course = weight_decay(config, steps)

    def update(updates: Any, count: jax.Array, params: Any) -> Any:
        strength = course(count)
        return jax.tree.map(
            lambda u, p, decays: u + (strength * p).astype(u.dtype) if decays else u,
            updates,
            params,
            mask,
        )

    return _counting(update)


def _clip(most: float, groups: Any) -> optax.GradientTransformation:
    """Bounds the norm of the gradients, of each group by itself.

    By one factor, 1 where nothing is to be clipped: the compiler takes a multiplication, and no
    division, into whatever reads the gradients next.
    """

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        names = [""] * len(leaves) if groups is None else structure.flatten_up_to(groups)
        parts = dict.fromkeys(names)  # In their order: each process traces the same.
        if len(parts) == 1 and norm is not None:
            norms = dict.fromkeys(parts, norm)
        else:
            norms = {
                name: optax.tree.norm([x for x, own in zip(leaves, names) if own == name])
                for name in parts
            }
        factors = {name: most / jnp.maximum(norm, most) for name, norm in norms.items()}
        clipped = [(x * factors[name]).astype(x.dtype) for x, name in zip(leaves, names)]
        return jax.tree.unflatten(structure, clipped), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _any_differs(rates: Any) -> bool:
    return any(np.any(np.asarray(rate) != 1.0) for rate in jax.tree.leaves(rates))


def _scale_each(rates: Any) -> optax.GradientTransformation:
    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda u, rate: (u * rate).astype(u.dtype), updates, rates)

    return optax.stateless(update)


def _held_back(trains_from: Any) -> optax.GradientTransformation:
    """Leaves out each parameter's updates before its time: it stays as it is, bit for bit."""

    def update(updates: Any, count: jax.Array, params: Any) -> Any:
        return jax.tree.map(
            lambda update, first: jnp.where(count >= first, update, 0), updates, trains_from
        )

    return _counting(update)


def _counting(function: Callable[[Any, jax.Array, Any], Any]) -> optax.GradientTransformation:
    """`function(updates, updates made before, params)` as a transformation."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        after = optax.ScaleByScheduleState(count=optax.safe_increment(state.count))
        return function(updates, state.count, params), after

    return optax.GradientTransformation(init, update)


def _check(config: OptimizerConfig) -> None:
    if config.name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer '{config.name}'{nearest(config.name, OPTIMIZERS)}")
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise UserError(f"optimizer.clip_norm must be positive or None, not {config.clip_norm}")
    decays = (config.weight_decay, config.final_weight_decay or 0.0)
    if config.learning_rate < 0 or min(decays) < 0:
        raise UserError("optimizer.learning_rate and weight_decay must not be negative")
    if not (0 <= config.b1 < 1 and 0 <= config.b2 < 1):
        raise UserError(f"optimizer.b1 and b2 must lie in [0, 1); got {config.b1}, {config.b2}")
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise UserError(
            f"optimizer.moment_dtype must be float32 or bfloat16, not '{config.moment_dtype}'"
        )
