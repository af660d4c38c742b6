"""What the teacher says of each row: its logits spread over all prototypes by Sinkhorn-Knopp."""

from typing import Literal

import jax
import jax.numpy as jnp

from common.sharding import per_shard

Scope = Literal["global", "per_device"]


def sinkhorn_knopp(
    logits: jax.Array,
    temperature: jax.typing.ArrayLike,
    *,
    valid: jax.Array | None = None,
    iterations: int = 3,
    scope: Scope = "global",
) -> jax.Array:
    """Assignments of rows to prototypes, used nearly equally by all rows (section 3.5).

    `exp(logits / temperature)` is scaled in turns so that every prototype gets the same total from
    all valid rows, and so that every row sums to 1; the rows last. In logarithms, so that no logit
    overflows or is lost. (The paper's divisions by the number of rows and prototypes cancel.)

    Args:
      logits: `[R, K]`; of a mesh's devices each holds some of the rows.
      temperature: T.
      valid: `[R]` bool: rows that are not padding. They count for nothing and come out as zeros.
      iterations: number of turns.
      scope: "global": prototypes are balanced over all rows of all devices, as the paper has it,
        and the result is the same on any number of devices. "per_device": over each device's rows
        by themselves.

    Returns:
      `[R, K]` fp32, valid rows summing to 1.
    """
    if valid is None:
        valid = jnp.ones(logits.shape[:1], bool)
    scaled = logits.astype(jnp.float32) / temperature

    def balance(scaled: jax.Array, valid: jax.Array) -> jax.Array:
        return _balanced(scaled, valid, iterations)

    if scope == "global":
        return balance(scaled, valid)
    return per_shard(balance, (scaled, valid), (("batch", None), ("batch",)), ("batch", None))


def _balanced(scaled: jax.Array, valid: jax.Array, iterations: int) -> jax.Array:
    # What a row or a prototype is multiplied by, in logarithms; of padding nothing.
    row = jnp.where(valid, 0.0, -jnp.inf)
    prototype = jnp.zeros(scaled.shape[1], jnp.float32)
    for _ in range(iterations):
        prototype = -jax.nn.logsumexp(scaled + row[:, None], axis=0)
        row = jnp.where(valid, -jax.nn.logsumexp(scaled + prototype, axis=1), -jnp.inf)
    assigned = jnp.exp(scaled + prototype + row[:, None])
    return jnp.where(valid[:, None], assigned, 0.0)


def centred_softmax(
    logits: jax.Array, centre: jax.Array, temperature: jax.typing.ArrayLike
) -> jax.Array:
    """`softmax((logits - centre) / temperature)`: `[R, K]` fp32 (section 3.6)."""
    return jax.nn.softmax((logits.astype(jnp.float32) - centre) / temperature, axis=-1)


def moved_centre(
    centre: jax.Array, logits: jax.Array, *, valid: jax.Array | None = None, momentum: float = 0.9
) -> jax.Array:
    """The centre that the next step takes off: `[K]` fp32.

    It moves towards the mean over all valid rows of all devices. (The reference takes a mean of the
    devices' means, also where they have different numbers of masked patches.)

    Args:
      centre: `[K]`.
      logits: `[R, K]` of this step.
      valid: `[R]` bool; where no row is, the centre stays.
      momentum: share of the old one.
    """
    logits = logits.astype(jnp.float32)
    if valid is None:
        return momentum * centre + (1 - momentum) * jnp.mean(logits, axis=0)
    count = jnp.sum(valid)
    mean = jnp.sum(jnp.where(valid[:, None], logits, 0.0), axis=0) / jnp.maximum(count, 1)
    return jnp.where(count > 0, momentum * centre + (1 - momentum) * mean, centre)
