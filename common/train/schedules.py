"""Learning-rate schedules: a linear warm-up, then one of four courses to the last step."""

import math

import jax
import jax.numpy as jnp
import optax

from common.errors import UserError, nearest

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def make_schedule(
    name: str,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.1,
    decay_fraction: float = 0.2,
    *,
    warmup_from_zero: bool = False,
) -> optax.Schedule:
    """Returns the learning rate as a function of the updates made before.

    Args:
      name: `cosine`, `linear`, `constant`, or `wsd` (warm up, stay, decay linearly at the end).
      peak: the rate after warm-up.
      steps: length of the run in updates.
      warmup_steps: updates of linear rise; update i of them uses `peak · (i + 1) / warmup_steps`.
        May be more than `steps`: the run then ends on the way up.
      final_fraction: the last rate as a fraction of the peak (not used by `constant`).
      decay_fraction: part of the run that `wsd` spends on its decay.
      warmup_from_zero: update i of the warm-up uses `peak · i / (warmup_steps - 1)`: the first one
        changes no parameter, and the last has the peak already.

    Raises:
      UserError: unknown name.
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule '{name}'{nearest(name, SCHEDULES)}")
    final = peak * final_fraction
    rest = max(1, steps - warmup_steps)
    if name == "cosine":
        course = optax.cosine_decay_schedule(peak, rest, alpha=final_fraction)
    elif name == "linear":
        course = optax.linear_schedule(peak, final, rest)
    elif name == "constant":
        course = optax.constant_schedule(peak)
    else:
        decay = min(rest, max(1, math.ceil(steps * decay_fraction)))
        course = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    if not warmup_steps:
        return course
    start = 0.0 if warmup_from_zero else peak / warmup_steps
    warmup = optax.linear_schedule(start, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, course], [warmup_steps])


def half_cosine(start: float, end: float, steps: int) -> optax.Schedule:
    """Returns `end + (start - end) (1 + cos(pi i / steps)) / 2` of update i, then `end`."""

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # By the sine of half the angle, which keeps its digits where the course ends.
        left = jnp.clip(steps - jnp.asarray(count, jnp.float32), 0, steps) / max(1, steps)
        return end + (start - end) * jnp.square(jnp.sin(0.5 * jnp.pi * left))

    return schedule
