"""Next-token cross-entropy that never holds the logits of a whole batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats, fp32: `logits [..., V]`, `targets [...]` -> `[...]`."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def by_chunks(function: Callable[..., Any], rows: Sequence[jax.Array], chunk: int | None) -> Any:
    """`function(*rows)` for `chunk` positions of each row at a time.

    The backward pass computes each chunk again, so that what the function makes of one exists of
    one chunk at a time.

    Args:
      function: maps arrays `[B, C, ...]` to a pytree of such.
      rows: arrays `[B, L, ...]`.
      chunk: C; None, or a C that does not divide L, computes all at once.

    Returns:
      The pytree, of `[B, L, ...]`.
    """
    batch, length = rows[0].shape[:2]
    if chunk is None or chunk >= length or length % chunk:
        return function(*rows)
    split = [split_rows(x, length // chunk) for x in rows]
    parts = jax.lax.map(jax.checkpoint(lambda piece: function(*piece)), split)
    return jax.tree.map(lambda x: joined_rows(x, batch, length), parts)


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """`[B, L, ...] -> [parts, B, L / parts, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], parts, x.shape[1] // parts, *x.shape[2:]), 1, 0)


def joined_rows(x: jax.Array, batch: int, length: int) -> jax.Array:
    """Undoes `split_rows`."""
    return jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:])


def chunked_nll(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    *,
    chunk: int | None,
) -> jax.Array:
    """`token_nll(head(hidden), targets)` for `chunk` positions of each row at a time.

    Args:
      head: maps `[B, C, D]` to logits `[B, C, V]`.
      hidden: `[B, L, D]`.
      targets: `[B, L]` int32.
      chunk: see `by_chunks`.

    Returns:
      `[B, L]` fp32 nats.
    """
    return by_chunks(lambda x, y: token_nll(head(x), y), (hidden, targets), chunk)
