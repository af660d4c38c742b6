"""RG-LRU in plain XLA: the coefficients in memory, then the recurrence of `linear_scan`."""

import jax
import jax.numpy as jnp

from common.kernels.linear_scan import xla as scan
from common.kernels.rg_lru.gates import coefficients


def forward(
    v: jax.Array,
    gate_x: jax.Array,
    gate_a: jax.Array,
    a_param: jax.Array,
    h0: jax.Array,
    reset: jax.Array,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns `h` `[B, L, E]` in the dtype of `v` and `h_last` `[B, E]` in float32."""
    a, x = coefficients(v, gate_x, gate_a, a_param, reset, valid)
    h, h_last = scan.forward(a, x, h0, reverse=False)
    return h.astype(v.dtype), h_last


def backward(
    v: jax.Array,
    gate_x: jax.Array,
    gate_a: jax.Array,
    a_param: jax.Array,
    h0: jax.Array,
    reset: jax.Array,
    valid: jax.Array | None,
    h: jax.Array,
    dh: jax.Array,
    dh_last: jax.Array,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `v, gate_x, gate_a, a_param, h0`, each in its dtype."""

    def gates(v, gate_x, gate_a, a_param):
        return coefficients(v, gate_x, gate_a, a_param, reset, valid)

    (a, _), pullback = jax.vjp(gates, v, gate_x, gate_a, a_param)
    h, dh = h.astype(jnp.float32), dh.astype(jnp.float32)
    da, dx, dh0 = scan.backward(a, h, h0, dh, dh_last, reverse=False)
    return *pullback((da, dx)), dh0
