"""Homogeneous depth: one module whose parameters carry a leading layer axis, applied by a scan."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

REMAT_POLICIES = ("none", "full", "dots")


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds `depth` independent copies as one module with leaves `[depth, ...]`."""
    return nnx.vmap(build)(rngs.split(depth))


def remat(body: Callable[..., Any], policy: str, *, in_loop: bool = True) -> Callable[..., Any]:
    """Wraps a layer so that its backward pass recomputes what `policy` does not keep.

    Args:
      body: function of arrays and modules.
      policy: "none" keeps every residual, "full" keeps the inputs alone, "dots" keeps the results
        of matrix products with parameters and recomputes the cheap rest.
      in_loop: whether a scan runs the layer. Its loop keeps XLA from merging the two passes;
        elsewhere a barrier has to.
    """
    if policy == "none":
        return body
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    if policy not in policies:
        raise ValueError(f"unknown remat policy {policy!r}; one of {REMAT_POLICIES}")
    return jax.checkpoint(body, policy=policies[policy], prevent_cse=not in_loop)
