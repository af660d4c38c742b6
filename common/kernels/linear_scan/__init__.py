"""Linear recurrence `h_t = a_t h_{t-1} + x_t` along time, with a gradient of its own.

One function, `linear_scan`. What runs underneath, `xla.py`, `tpu.py` or `gpu.py`, is chosen by
`implementation`; each has a `forward`, a `backward` and a `summary` of the same signatures.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.kernels.dispatch import check_implementation, dispatch, unfit
from common.kernels.linear_scan import reference, sequence, xla


def linear_scan(
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array | None = None,
    *,
    reverse: bool = False,
    axis_name: str | None = None,
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
        axis_name: Inside a `shard_map`: the mesh axis over which the sequence lies, each device
            holding L of its steps. `h0` and `h_last` belong to the whole sequence and are the same
            on all devices.
        implementation: "reference", "xla", "tpu", "gpu", or None for the fastest of the platform.

    Returns:
        `h` `[B, L, D]` in the dtype of `x`, and the last computed state `[B, D]` in float32 (step
        0 when `reverse`).

    Raises:
        UserError: A shape, dtype or implementation that does not fit.
    """
    _check(a, x, h0)
    check_implementation("linear_scan", implementation)
    if h0 is None:
        h0 = jnp.zeros_like(x[:, 0], dtype=jnp.float32)
    a, x, h0 = _varying_alike(a, x, h0.astype(jnp.float32))
    if implementation == "reference":
        (h, h_last), _ = _scan_fwd(implementation, reverse, axis_name, a, x, h0)
    else:
        h, h_last = _scan(implementation, reverse, axis_name, a, x, h0)
    if axis_name is not None:
        h_last = sequence.from_last(h_last, axis_name, reverse=reverse)
    return h, h_last


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


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Marks all arrays as varying over the same mesh axes, where a `shard_map` keeps account."""
    all_axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    together = frozenset().union(*all_axes)
    return [
        jax.lax.pcast(array, tuple(together - axes), to="varying") if together - axes else array
        for array, axes in zip(arrays, all_axes)
    ]


# Of a sequence over several devices these return the state after each device's part.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(
    name: str | None,
    reverse: bool,
    axis_name: str | None,
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _scan_fwd(name, reverse, axis_name, a, x, h0)[0]


def _scan_fwd(
    name: str | None,
    reverse: bool,
    axis_name: str | None,
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    h0 = _entering(name, reverse, axis_name, a, x, h0)
    h, h_last = _run("forward", name, a, x, h0, reverse=reverse)
    return (h, h_last), (a, h, h0)


def _scan_bwd(
    name: str | None,
    reverse: bool,
    axis_name: str | None,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dh, dh_last = cotangents
    if axis_name is None:
        return _run("backward", name, *residuals, dh, dh_last, reverse=reverse)
    against = not reverse
    product, last = _run("summary", name, residuals[0], dh, reverse=against, decayed=True)
    last = product * dh_last + last
    nothing = jnp.zeros_like(dh_last)
    dh_last = dh_last + sequence.entering(product, last, nothing, axis_name, reverse=against)
    da, dx, dh0 = _run("backward", name, *residuals, dh, dh_last, reverse=reverse)
    # The state that enters a later part is no argument of anything.
    return da, dx, jnp.where(sequence.is_first(axis_name, reverse=reverse), dh0, 0)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _entering(
    name: str | None,
    reverse: bool,
    axis_name: str | None,
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
) -> jax.Array:
    if axis_name is None:
        return h0
    product, last = _run("summary", name, a, x, reverse=reverse, decayed=False)
    return sequence.entering(product, last, h0, axis_name, reverse=reverse)


def _run(function: str, name: str | None, *operands: jax.Array, **options: bool) -> Any:
    """Calls `function` of an implementation; the first two operands are `[B, L, D]`."""
    if name in ("reference", "xla"):
        return getattr(reference if name == "reference" else xla, function)(*operands, **options)
    # Pallas is slow to import, and not everyone comes here.
    from common.kernels.linear_scan import gpu, tpu

    kernels = {
        platform: unfit(platform, *operands[:2])
        or functools.partial(getattr(module, function), **options)
        for platform, module in (("tpu", tpu), ("gpu", gpu))
    }
    default = functools.partial(getattr(xla, function), **options)
    return dispatch("linear_scan", name, *operands, xla=default, **kernels)
