"""Linear recurrence `h_t = a_t h_{t-1} + x_t` along time, with a gradient of its own.

One function, `linear_scan`; what runs underneath is chosen by `implementation`. Each entry of
`_IMPLEMENTATIONS` is a pair of a forward and a backward function with the signatures of `xla.py`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.kernels.linear_scan import reference, xla


class _Implementation(NamedTuple):
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


_IMPLEMENTATIONS = {"xla": _Implementation(xla.forward, xla.backward)}


def linear_scan(
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array | None = None,
    *,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs `h_t = a_t h_{t-1} + x_t` over the middle axis.

    The state is float32 whatever the inputs are; `a_t = 0` forgets everything before `t`, exactly.
    Gradients flow to `a`, `x` and `h0`, and from `h` and `h_last`. With 16-bit `x` the gradient of
    `a` uses the stored, rounded `h`; keep `a` itself in float32, since 16 bits cannot tell decays
    near one apart.

    Args:
        a: Decay of each step, `[B, L, D]`.
        x: Input of each step, `[B, L, D]`.
        h0: State before the first step, `[B, D]`; zeros when absent.
        reverse: Runs from the last step to the first; `h0` then stands after the last step.
        implementation: "reference", "xla", or None for the fastest of the platform.

    Returns:
        `h` `[B, L, D]` in the dtype of `x`, and the last computed state `[B, D]` in float32 (step
        0 when `reverse`).

    Raises:
        UserError: A shape, dtype or implementation that does not fit.
    """
    _check(a, x, h0)
    if h0 is None:
        h0 = jnp.zeros_like(x[:, 0], dtype=jnp.float32)
    if implementation == "reference":
        return reference.forward(a, x, h0, reverse=reverse)
    name = "xla" if implementation is None else implementation
    if name not in _IMPLEMENTATIONS:
        known = ", ".join(["reference", *_IMPLEMENTATIONS])
        raise UserError(
            f"linear_scan has no implementation '{name}' here; choose one of {known}, or None"
        )
    return _scan(name, reverse, a, x, h0)


def _check(a: jax.Array, x: jax.Array, h0: jax.Array | None) -> None:
    if x.ndim != 3 or a.shape != x.shape:
        raise UserError(
            f"linear_scan needs a and x of one shape [B, L, D]; got {a.shape} and {x.shape}"
            " (use jax.vmap for more leading axes)"
        )
    if x.shape[1] == 0:
        raise UserError("linear_scan needs at least one time step; got L = 0")
    batch, _, width = x.shape
    if h0 is not None and h0.shape != (batch, width):
        raise UserError(f"linear_scan needs h0 of shape {(batch, width)}; got {h0.shape}")
    for name, array in (("a", a), ("x", x), ("h0", h0)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"linear_scan needs real floating inputs; {name} is {array.dtype}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    name: str, reverse: bool, a: jax.Array, x: jax.Array, h0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _IMPLEMENTATIONS[name].forward(a, x, h0, reverse=reverse)


def _scan_fwd(
    name: str, reverse: bool, a: jax.Array, x: jax.Array, h0: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    h, h_last = _IMPLEMENTATIONS[name].forward(a, x, h0, reverse=reverse)
    return (h, h_last), (a, h, h0)


def _scan_bwd(
    name: str,
    reverse: bool,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _IMPLEMENTATIONS[name].backward(*residuals, *cotangents, reverse=reverse)


_scan.defvjp(_scan_fwd, _scan_bwd)
