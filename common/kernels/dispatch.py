"""Which implementation of a kernel runs: by name, or by the platform a program is compiled for."""

from collections.abc import Callable
from typing import Any

import jax

from common.errors import UserError

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")


def check_implementation(kernel: str, name: str | None) -> None:
    """Raises `UserError` unless `name` is None or one of `IMPLEMENTATIONS`."""
    if name is not None and name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise UserError(
            f"{kernel} has no implementation '{name}' here; choose one of {known}, or None"
        )


def dispatch(
    kernel: str,
    name: str | None,
    *operands: Any,
    xla: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Any:
    """Calls one implementation on `operands`, trees of arrays.

    With no name the choice is made when the program is lowered, not when it is traced, so that a
    program compiled ahead of time for a TPU on a host without one gets the TPU's kernel. A kernel
    asked for by name runs in Pallas' interpreter on any other platform.

    Args:
      kernel: its name, for errors.
      name: "xla", "tpu", "gpu" or None.
      operands: positional arguments of every implementation.
      xla: plain JAX, for any platform.
      tpu, gpu: Pallas kernels, taking also `interpret: bool`; None where these operands have none.
    """
    if name == "xla" or (name is None and tpu is None and gpu is None):
        return xla(*operands)
    if name is None:
        kernels = {"tpu": tpu, "cuda": gpu}
        return jax.lax.platform_dependent(
            *operands, default=xla, **{k: _compiled(f) for k, f in kernels.items() if f is not None}
        )
    chosen, platform = {"tpu": (tpu, "tpu"), "gpu": (gpu, "cuda")}[name]
    if chosen is None:
        shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(operands))
        raise UserError(f"{kernel} has no {name} kernel for operands of shapes {shapes}")
    return jax.lax.platform_dependent(
        *operands, default=_interpreted(chosen), **{platform: _compiled(chosen)}
    )


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: function(*operands, interpret=False)


def _interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: function(*operands, interpret=True)
