"""Which implementation of a kernel runs: by name, or by the platform a program is compiled for."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from common.errors import UserError

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
Form = Callable[..., Any]
_DTYPES = {"tpu": ("float32", "bfloat16"), "gpu": ("float32", "bfloat16", "float16")}
# The oldest GPUs that the kernels' compiler and their 16-bit products are made for.
_CAPABILITY = 8.0


def check_implementation(kernel: str, name: str | None) -> None:
    """Raises `UserError` unless `name` is None or one of `IMPLEMENTATIONS`."""
    if name is not None and name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise UserError(
            f"{kernel} has no implementation '{name}' here; choose one of {known}, or None"
        )


def unfit(platform: str, *arrays: jax.Array) -> str | None:
    """Returns why no kernel of a platform ("tpu", "gpu") takes such arrays; None if they may."""
    for array in arrays:
        if not array.size:
            return f"an array {tuple(array.shape)} is empty"
        known = _DTYPES[platform]
        if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.name not in known:
            return f"{array.dtype.name} is not one of {', '.join(known)}"
    return None


def dispatch(
    kernel: str,
    name: str | None,
    *operands: Any,
    xla: Form,
    tpu: Form | str,
    gpu: Form | str,
) -> Any:
    """Calls one implementation on `operands`, trees of arrays.

    With no name the choice is made when the program is lowered, not when it is traced, so that a
    program compiled ahead of time for a TPU on a host without one gets the TPU's kernel. Where a
    platform has a kernel, but not for these operands or this device, lowering a program for it
    warns and takes `xla`. A kernel asked for by name runs in Pallas' interpreter on any other
    platform.

    Args:
      kernel: its name, for messages.
      name: "xla", "tpu", "gpu" or None.
      operands: positional arguments of every implementation.
      xla: plain JAX, for any platform.
      tpu, gpu: Pallas kernels, taking also `interpret: bool`; or why these operands have none
        ("head width 512 is above 256").

    Raises:
      UserError: a kernel is asked for by name and there is none for these operands or this device.
    """
    if name == "xla":
        return xla(*operands)
    forms = {"tpu": tpu, "cuda": _unfit_gpu() or gpu}
    if name is None:
        branches = {
            platform: _compiled(form) if callable(form) else _instead(kernel, form, xla)
            for platform, form in forms.items()
        }
        return jax.lax.platform_dependent(*operands, default=xla, **branches)
    platform = {"tpu": "tpu", "gpu": "cuda"}[name]
    form = forms[platform]
    if not callable(form):
        raise UserError(f"{kernel} has no {name} kernel here: {form}")
    return jax.lax.platform_dependent(
        *operands, default=_interpreted(form), **{platform: _compiled(form)}
    )


def _compiled(function: Form) -> Form:
    return lambda *operands: function(*operands, interpret=False)


def _interpreted(function: Form) -> Form:
    return lambda *operands: function(*operands, interpret=True)


def _instead(kernel: str, why: str, xla: Form) -> Form:
    """Returns `xla`, with a warning where it is lowered."""
    text = f"{kernel} runs without its kernel, in plain JAX: {why}"

    def run(*operands: Any) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        leaves[0] = _warned.bind(leaves[0], text=text)
        return xla(*jax.tree.unflatten(tree, leaves))

    return run


@functools.cache
def _unfit_gpu() -> str | None:
    """Returns why this process's GPU runs no kernel of ours; None if it does or there is none."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability and float(capability) < _CAPABILITY:
        return f"{device.device_kind} has compute capability {capability}, less than {_CAPABILITY}"
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError as error:
        return f"this jax has no Pallas for it ({error})"
    return None


# The identity, which warns when a program that runs it is lowered: tracing does not tell for which
# platform that will be.
_warned = Primitive("warned")
_warned.def_impl(lambda x, *, text: x)
_warned.def_abstract_eval(lambda x, *, text: x)
batching.defvectorized(_warned)
ad.deflinear2(_warned, lambda cotangent, x, *, text: (cotangent,))


def _lower_warned(context: Any, x: Any, *, text: str) -> list[Any]:
    warnings.warn(text, stacklevel=1)
    return [x]


mlir.register_lowering(_warned, _lower_warned)
