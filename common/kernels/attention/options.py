"""What attention may see: window bounds and masks, shared by all implementations."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Options:
    """The static part of one attention call.

    Positions are those of the keys: query `t` of `T` stands at `t + offset`, `t + S - T` unless
    the call says otherwise. It may see the keys from `before` positions behind it to `after`
    positions ahead of it; None means no bound.
    """

    scale: float
    softcap: float | None
    before: int | None
    after: int | None

    def seen(self, keys: int) -> int:
        """Returns how many of `keys` one query sees at the most."""
        if self.before is None or self.after is None:
            return keys
        return min(keys, self.before + 1 + self.after)


def in_window(options: Options, positions: jax.Array, keys: jax.Array) -> jax.Array | None:
    """Returns which `keys` `[s]` queries at `positions` `[t]` may see, `[t, s]`; None for all."""
    distance = positions[:, None] - keys[None, :]
    seen = None
    if options.before is not None:
        seen = distance <= options.before
    if options.after is not None:
        ahead = distance >= -options.after
        seen = ahead if seen is None else seen & ahead
    return seen


def grouped_mask(mask: jax.Array, kv_heads: int) -> jax.Array:
    """Splits the head axis of a mask `[B|1, H|1, T|1, S|1]` into `[.., K|1, G|1, .., ..]`."""
    batch, heads, queries, keys = mask.shape
    if heads == 1:
        return mask[:, :, None]
    return mask.reshape(batch, kv_heads, heads // kv_heads, queries, keys)


def both(first: jax.Array | None, second: jax.Array | None) -> jax.Array | None:
    """Returns the conjunction of two masks, None standing for one that allows everything."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def same_segment(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Returns `[B, 1, 1, t, s]`: True where query and key are of one segment."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None, None]


def allowed_pairs(
    options: Options,
    mask: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    offset: jax.Array | None,
    queries: int,
    keys: int,
) -> jax.Array | None:
    """Returns all that is allowed, broadcastable to `[B, K, G, T, S]`; None for everything."""
    start = keys - queries if offset is None else offset
    allowed = in_window(options, jnp.arange(queries) + start, jnp.arange(keys))
    if segments is not None:
        allowed = both(allowed, same_segment(*segments))
    return both(allowed, mask)
