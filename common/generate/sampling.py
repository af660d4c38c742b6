"""Choosing the next token from logits: greedy, temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp

from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
      temperature: 0 takes the most likely token; otherwise logits are divided by it.
      top_k: keep the k most likely tokens, or None.
      top_p: of those, keep the smallest set of tokens whose probability reaches p, or None.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be zero or positive, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")


def truncate_logits(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Sets the logits `[B, V]` of all tokens outside top-k, then outside top-p, to -inf."""
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if top_p is not None and top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if the mass before it is short of p; the first always does.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
      logits: `[B, V]` fp32.
      keys: `[B]` random keys, one a row, so that a row's draw does not depend on its neighbours.
      sampling: static choice of the method.

    Returns:
      tokens `[B]` int32 and their log-probabilities `[B]` fp32 under the model's own softmax
      (temperature 1, nothing cut off).
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0.0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        scaled = truncate_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    tokens = tokens.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)
