"""Homogeneous depth: one module whose parameters carry a leading layer axis, applied by a scan."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

REMAT_POLICIES = ("none", "full", "dots")
# So many blocks at most are written out on a CPU: what it takes to compile them grows with them.
_MOST_WRITTEN_OUT = 8


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds `depth` independent copies as one module with leaves `[depth, ...]`."""
    return nnx.vmap(build)(rngs.split(depth))


def scan_layers(
    body: Callable[[Any, Any], tuple[Any, Any]],
    x: Any,
    layers: Any,
    policy: str = "none",
    *,
    blocks: int = 1,
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, x, layers)`, of which the backward pass keeps what `policy` says.

    On a mesh of CPUs a few layers are written out: a loop there slices each layer's weights out of
    their stack by copying them, and first fills with zeros what it writes results and gradients to.

    Args:
      body, x, layers: as of `jax.lax.scan`.
      policy: see `remat`.
      blocks: how many blocks a layer has.
    """
    depth = len(jax.tree.leaves(layers)[0])
    device = jax.sharding.get_abstract_mesh().abstract_device  # None without a mesh.
    on_cpu = device is not None and device.device_kind == "cpu"
    write_out = on_cpu and depth * blocks <= _MOST_WRITTEN_OUT
    body = remat(body, policy, in_loop=not write_out)
    return jax.lax.scan(body, x, layers, unroll=depth if write_out else 1)


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
