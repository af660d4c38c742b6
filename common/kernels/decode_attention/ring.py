"""Which slots of a ring of keys a query may see.

Position `p` lies in slot `p mod S`: after `n` tokens slot `s` holds the newest position below `n`
that is `s` modulo `S`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Options:
    """The static part of one call."""

    scale: float
    softcap: float | None
    window: int | None


def held(lengths: jax.Array, slots: int) -> jax.Array:
    """Returns the position that each slot holds, `[B, S]`; negative if none."""
    newest = lengths[:, None] - 1
    return newest - (newest - jnp.arange(slots)[None]) % slots


def own_positions(lengths: jax.Array, queries: int, new: object | None) -> jax.Array:
    """Returns where the queries stand, `[B, T]`."""
    first = lengths if new is not None else lengths - queries
    return first[:, None] + jnp.arange(queries)[None]


def visible(
    options: Options, lengths: jax.Array, starts: jax.Array, own: jax.Array, slots: int
) -> jax.Array:
    """Returns which slots each query may see, `[B, T, S]`."""
    positions = held(lengths, slots)
    cached = positions >= jnp.maximum(starts, 0)[:, None]
    seen = cached[:, None] & (positions[:, None] <= own[..., None])
    if options.window is not None:
        seen &= positions[:, None] > own[..., None] - options.window
    return seen


def visible_new(options: Options, queries: int) -> jax.Array:
    """Returns which of the queries' own tokens each query may see, `[T, T]`."""
    behind = jnp.arange(queries)[:, None] - jnp.arange(queries)[None]
    seen = behind >= 0
    return seen if options.window is None else seen & (behind < options.window)


def lowest(
    options: Options, lengths: jax.Array, starts: jax.Array, own: jax.Array, slots: int
) -> jax.Array:
    """Returns the first position `[B]` that any query may see."""
    low = jnp.maximum(jnp.maximum(starts, 0), lengths - slots)
    return low if options.window is None else jnp.maximum(low, own[:, 0] - options.window + 1)


def blocks(
    low: jax.Array, lengths: jax.Array, slots: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the first block of slots and the number of blocks that positions fill, `[B]` each.

    The positions run from `low` to `lengths`, their blocks cyclically from the first one on.
    """
    number = -(-slots // block)
    tokens = jnp.clip(lengths - low, 0, slots)
    first_slot = low % slots
    last_slot = first_slot + tokens - 1
    first = first_slot // block
    straight = last_slot // block - first + 1
    around = number - first + (last_slot - slots) // block + 1
    count = jnp.where(last_slot < slots, straight, jnp.minimum(around, number))
    return first, jnp.where(tokens > 0, count, 0)
