"""Oracle of the RG-LRU: the definition, differentiated by JAX itself."""

import jax

from common.kernels.linear_scan import reference as scan
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
