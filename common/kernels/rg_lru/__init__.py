"""The Real-Gated Linear Recurrent Unit after its two linear maps: gates and recurrence as one.

`rg_lru` reads the input and both gates' pre-activations and writes the states: on TPU and GPU the
gates, the decays and the gated input never exist in memory. Its gradient recomputes them; what is
kept for it are the inputs and `h`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.kernels.dispatch import check_implementation, dispatch, unfit
from common.kernels.rg_lru import gates, reference, xla

__all__ = ["rg_lru"]


def rg_lru(
    v: jax.Array,
    gate_x: jax.Array,
    gate_a: jax.Array,
    a_param: jax.Array,
    h0: jax.Array | None = None,
    *,
    reset: jax.Array,
    valid: jax.Array | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs `h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t v_t` over the middle axis (Griffin, eq. 1-4).

    `i, r = sigmoid(gate_x), sigmoid(gate_a)` and `log a = -8 r softplus(a_param)`, in float32, as
    the state is. Gradients flow to all floating arguments, and from both results; with 16-bit `v`
    the decay's gradient uses the stored, rounded `h`. The slope of the square root is limited to
    1000, so that gradients stay finite at a = 1.

    Args:
      v: input, `[B, L, E]`.
      gate_x: input gate before its sigmoid, `[B, L, E]`, of any floating dtype.
      gate_a: recurrence gate before its sigmoid, likewise.
      a_param: Lambda `[E]`.
      h0: state before the first step, `[B, E]`; zeros when absent.
      reset: `[B or 1, L]` bool: True where a document starts: `h = i v`, nothing from before.
      valid: `[B or 1, L]` bool: False where a token leaves the state as it is; None: nowhere.
      axis_name: inside `jax.shard_map`, the mesh axis over which the steps lie in order; `h0` and
        the last state are then those of the whole sequence, on every device.
      implementation: "reference", "xla", "tpu", "gpu", or None for that of the platform.

    Returns:
      `h` `[B, L, E]` in the dtype of `v`, and the last state `[B, E]` in float32.

    Raises:
      UserError: a shape, dtype or implementation that does not fit.
    """
    check_implementation("rg_lru", implementation)
    _check(v, gate_x, gate_a, a_param, h0, reset, valid)
    if h0 is None:
        h0 = jnp.zeros_like(v[:, 0], dtype=jnp.float32)

    def run(h0: jax.Array) -> tuple[jax.Array, jax.Array]:
        operands = v, gate_x, gate_a, a_param, h0, reset, valid
        if implementation == "reference":
            return reference.forward(*operands)
        return _rg_lru(implementation, *operands)

    if axis_name is None:
        return run(h0)
    # What this device does to any state, from which each learns the state that reaches it.
    product = gates.product_of_decays(gate_a, a_param, reset, valid)
    _, end = run(jnp.zeros_like(h0))
    products, ends = jax.lax.all_gather((product, end), axis_name)
    states = [h0.astype(jnp.float32)]
    for a, x in zip(products, ends):
        states.append(a * states[-1] + x)
    h, _ = run(jnp.stack(states)[jax.lax.axis_index(axis_name)])
    return h, states[-1]


def _check(v, gate_x, gate_a, a_param, h0, reset, valid) -> None:
    if v.ndim != 3 or gate_x.shape != v.shape or gate_a.shape != v.shape:
        raise UserError(
            "rg_lru needs v, gate_x and gate_a of one shape [B, L, E]; got "
            f"{v.shape}, {gate_x.shape} and {gate_a.shape}"
        )
    batch, length, width = v.shape
    if 0 in v.shape:
        raise UserError(
            f"rg_lru needs at least one step, row and channel; got v of shape {v.shape}"
        )
    if a_param.shape != (width,):
        raise UserError(f"rg_lru needs a_param of shape {(width,)}; got {a_param.shape}")
    if h0 is not None and h0.shape != (batch, width):
        raise UserError(f"rg_lru needs h0 of shape {(batch, width)}; got {h0.shape}")
    for name, mask in (("reset", reset), ("valid", valid)):
        if mask is None:
            continue
        if mask.shape not in ((batch, length), (1, length)) or mask.dtype != bool:
            raise UserError(
                f"rg_lru needs {name} of shape {(batch, length)} or {(1, length)} and dtype bool; "
                f"got {mask.shape} of {mask.dtype}"
            )
    floating = {"v": v, "gate_x": gate_x, "gate_a": gate_a, "a_param": a_param, "h0": h0}
    for name, array in floating.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"rg_lru needs real floating inputs; {name} is {array.dtype}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rg_lru(name: str | None, *operands: Any) -> tuple[jax.Array, jax.Array]:
    return dispatch(
        "rg_lru",
        name,
        *operands,
        xla=xla.forward,
        tpu=unfit("tpu", *operands[:5]) or _tpu_forward,
        gpu=unfit("gpu", *operands[:5]) or _gpu_forward,
    )


def _rg_lru_fwd(name: str | None, *operands: Any) -> tuple[Any, Any]:
    h, h_last = _rg_lru(name, *operands)
    return (h, h_last), (*operands, h)


def _rg_lru_bwd(name: str | None, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients = dispatch(
        "rg_lru",
        name,
        *residuals,
        *cotangents,
        xla=xla.backward,
        tpu=unfit("tpu", *residuals[:5]) or _tpu_backward,
        gpu=unfit("gpu", *residuals[:5]) or _gpu_backward,
    )
    return *gradients, None, None  # for reset and valid


_rg_lru.defvjp(_rg_lru_fwd, _rg_lru_bwd)


# Pallas is imported where a program is traced, not with the package.


def _tpu_forward(*operands: Any, interpret: bool) -> Any:
    from common.kernels.rg_lru import tpu

    return tpu.forward(*operands, interpret=interpret)


def _tpu_backward(*operands: Any, interpret: bool) -> Any:
    from common.kernels.rg_lru import tpu

    return tpu.backward(*operands, interpret=interpret)


def _gpu_forward(*operands: Any, interpret: bool) -> Any:
    from common.kernels.rg_lru import gpu

    return gpu.forward(*operands, interpret=interpret)


def _gpu_backward(*operands: Any, interpret: bool) -> Any:
    from common.kernels.rg_lru import gpu

    return gpu.backward(*operands, interpret=interpret)
