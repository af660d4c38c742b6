"""NVIDIA's own fused attention (cuDNN, through JAX), where this GPU was found faster with it.

It knows no soft cap, masks or segments, and its library must be there even to compile: so it is
never taken for a program that is compiled elsewhere. `python -m benchmarks.tune` measures it beside
our kernels and writes what it finds into the tuning table, as the block sizes of "route".
"""

from pathlib import Path

import jax

from common.errors import UserError
from common.kernels import tuning
from common.kernels.attention.options import Options

OURS, VENDOR = 1, 2
_WIDEST = 128  # of a head, forward and backward


def preferred(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array | None,
    segments: object | None,
    offset: jax.Array | None,
) -> bool:
    """Returns whether to take it for arrays `[B, T, H, h]` and `[B, S, K, h]` on this machine."""
    if jax.default_backend() != "gpu" or any(x is not None for x in (mask, segments, offset)):
        return False
    if unfit(options, q, k):
        return False
    keys = k.shape[1]
    shape = {"T": q.shape[1], "S": keys, "W": options.seen(keys), "h": q.shape[-1]}
    default = {"route": OURS}
    route = tuning.blocks(Path(__file__).parent, "route", k.dtype, shape, default)["route"]
    if route not in (OURS, VENDOR):
        raise UserError(f"attention has the routes {OURS} (ours) and {VENDOR} (cuDNN); not {route}")
    return route == VENDOR


def unfit(options: Options, q: jax.Array, k: jax.Array) -> str | None:
    """Returns why it does not compute this; None if it does."""
    if options.softcap is not None:
        return "it has no soft cap"
    if q.dtype != k.dtype or q.dtype.name not in ("bfloat16", "float16"):
        return f"{q.dtype.name} is not a 16-bit dtype"
    if q.shape[-1] > _WIDEST or q.shape[-1] % 8:
        return f"head width {q.shape[-1]} is not a multiple of 8 up to {_WIDEST}"
    if options.after not in (None, 0) or (options.before is not None and options.after is None):
        return "its window has no keys ahead of the query"
    # Where there are more keys than queries, it counts positions from the first of each.
    if options.after == 0 and q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries do not stand at {k.shape[1]} keys"
    return None


def attention(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "cudnn"
) -> jax.Array:
    """Returns `[B, T, H, h]`; has its own gradient.

    Args:
      options, q, k, v: what `unfit` lets pass.
      implementation: "cudnn", or "xla" for the same call where there is no GPU.
    """
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=options.scale,
        is_causal=options.after == 0,
        local_window_size=None if options.before is None else (options.before, 0),
        implementation=implementation,
    )
