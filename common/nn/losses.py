"""Next-token cross-entropy that never holds the logits of a whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats, fp32: `logits [..., V]`, `targets [...]` -> `[...]`."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def chunked_nll(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    *,
    chunk: int | None,
) -> jax.Array:
    """`token_nll(head(hidden), targets)` for `chunk` positions of each row at a time.

    The backward pass recomputes the logits of a chunk, so memory holds `[B, chunk, V]` instead of
    `[B, L, V]`.

    Args:
      head: maps `[B, C, D]` to logits `[B, C, V]`.
      hidden: `[B, L, D]`.
      targets: `[B, L]` int32.
      chunk: C; None, or a C that does not divide L, computes all at once.

    Returns:
      `[B, L]` fp32 nats.
    """
    batch, length = targets.shape
    if chunk is None or chunk >= length or length % chunk:
        return token_nll(head(hidden), targets)

    @jax.checkpoint
    def of_chunk(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return token_nll(head(pair[0]), pair[1])

    parts = length // chunk
    hidden = jnp.moveaxis(hidden.reshape(batch, parts, chunk, -1), 1, 0)
    split = jnp.moveaxis(targets.reshape(batch, parts, chunk), 1, 0)
    nll = jax.lax.map(of_chunk, (hidden, split))  # [L/C, B, C]
    return jnp.moveaxis(nll, 0, 1).reshape(batch, length)
