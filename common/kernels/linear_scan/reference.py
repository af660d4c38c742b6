"""Oracle of the linear recurrence: one `lax.scan`, float32 state, differentiated by JAX itself."""

import jax
import jax.numpy as jnp


def forward(
    a: jax.Array, x: jax.Array, h0: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns `h` `[B, L, D]` in the dtype of `x` and `h_last` `[B, D]` in float32."""

    def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a_t, x_t = inputs
        h = a_t.astype(jnp.float32) * h + x_t.astype(jnp.float32)
        return h, h.astype(x.dtype)

    time_major = (jnp.swapaxes(a, 0, 1), jnp.swapaxes(x, 0, 1))
    h_last, h = jax.lax.scan(step, h0.astype(jnp.float32), time_major, reverse=reverse)
    return jnp.swapaxes(h, 0, 1), h_last


def summary(
    a: jax.Array, x: jax.Array, *, reverse: bool, decayed: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the product of all decays and the last state from zero; see `xla.summary`."""
    a = a.astype(jnp.float32)
    x = a * x if decayed else x
    _, last = forward(a, x, jnp.zeros_like(x[:, 0], jnp.float32), reverse=reverse)
    return jnp.prod(a, axis=1), last
