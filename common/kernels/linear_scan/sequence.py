"""One sequence over several devices, inside a `shard_map`: each runs its part of the time.

A part does one thing to any state that enters it: `h -> product * h + last`. The devices exchange
these summaries, a few numbers per channel, and each composes those of the parts before its own.
"""

import jax
import jax.numpy as jnp
from jax import lax

from common.kernels.linear_scan.xla import link


def entering(
    product: jax.Array, last: jax.Array, start: jax.Array, axis_name: str, *, reverse: bool
) -> jax.Array:
    """Returns the state that enters this device's part, `[B, D]` in float32.

    Args:
      product: of the decays of this part, `[B, D]`.
      last: state after this part from zero, `[B, D]`.
      start: state before the first part, on every device.
      axis_name: mesh axis along which the parts follow one another.
      reverse: Whether they do so from its end to its beginning.
    """
    start = start.astype(jnp.float32)[:, None]
    products, lasts = lax.all_gather((product, last), axis_name, axis=1)
    states = link(products, lasts, start[:, 0], reverse=reverse)
    parts = [states[:, 1:], start] if reverse else [start, states[:, :-1]]
    before = jnp.concatenate(parts, axis=1)
    return lax.dynamic_index_in_dim(before, lax.axis_index(axis_name), axis=1, keepdims=False)


def is_first(axis_name: str, *, reverse: bool) -> jax.Array:
    """Returns whether this device has the part that comes first."""
    return lax.axis_index(axis_name) == (lax.axis_size(axis_name) - 1 if reverse else 0)


def from_last(state: jax.Array, axis_name: str, *, reverse: bool) -> jax.Array:
    """Returns the `state` of the device that has the last part, on all of them."""
    here = is_first(axis_name, reverse=not reverse)
    return lax.psum(jnp.where(here, state, 0), axis_name)
