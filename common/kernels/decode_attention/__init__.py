"""Attention of the newest tokens over a cache of earlier keys: what a decode step does.

One function, `decode_attention`. The cache is read once, and on accelerators only as far as a row's
tokens reach; `xla.py` is plain JAX, `tpu.py` and `gpu.py` are kernels that return, for the cache
alone, the output and the log of the softmax's denominator, to which the queries' own keys are then
added.
"""

import functools

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.kernels.decode_attention import reference, xla
from common.kernels.decode_attention.ring import Options
from common.kernels.dispatch import Form, check_implementation, dispatch, unfit


def decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    *,
    new: tuple[jax.Array, jax.Array] | None = None,
    starts: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Returns the attention of each row's last `T` tokens, causal, over that row's cache.

    The cache is a ring: position `p` of a row lies in slot `p mod S`, so that it holds the last `S`
    positions. A cache that is never full is the same without the wrap. Scores and softmax are
    float32. A query with no key to see gives zeros.

    Args:
        q: Queries `[B, T, H, h]`, few: one, or the drafts to be verified.
        keys: `[B, K, S, h]`, `H` a multiple of `K`: each head's keys lie together, as every
            accelerator reads them.
        values: `[B, K, S, h]`.
        lengths: `[B]` int32 number of tokens that went into each row's cache.
        new: Keys and values of the queries' own tokens, `[B, T, K, h]` each, if they are not in the
            cache yet: query `t` then stands at position `lengths + t`. Without, the queries are
            the cache's last tokens, and query `t` stands at `lengths - T + t`.
        starts: `[B]` int32 first position in the cache that may be seen; 0 when absent.
        window: Number of keys that a query sees, its own included; all when absent.
        softcap: Bounds scores by `softcap * tanh(score / softcap)`.
        scale: Factor of the scores; `h ** -0.5` when absent.
        implementation: "reference", "xla", "tpu", "gpu", or None for the fastest of the platform
            that the program is compiled for.

    Returns:
        `[B, T, H, h]` in the dtype of `q`.

    Raises:
        UserError: A shape, dtype, window or implementation that does not fit.
    """
    check_implementation("decode_attention", implementation)
    _check(q, keys, values, lengths, new, starts, window)
    batch, queries, heads, width = q.shape
    kv_heads = keys.shape[1]
    options = Options(
        float(width**-0.5 if scale is None else scale),
        None if softcap is None else float(softcap),
        window,
    )
    starts = jnp.zeros_like(lengths) if starts is None else starts
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    operands = (grouped, keys, values, lengths, starts, new)
    if implementation == "reference":
        return reference.attention(options, *operands).reshape(q.shape)
    return _attention(options, implementation, *operands).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    options: Options,
    name: str | None,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    operands = (q, keys, values, lengths, starts, new)
    default = functools.partial(xla.attention, options)
    return dispatch("decode_attention", name, *operands, xla=default, **_kernels(options, q, keys))


def _attention_fwd(options: Options, name: str | None, *operands: jax.Array) -> tuple:
    return _attention(options, name, *operands), operands


def _attention_bwd(options: Options, name: str | None, operands: tuple, d_out: jax.Array) -> tuple:
    """The gradient of plain JAX: decoding is seldom differentiated."""
    q, keys, values, lengths, starts, new = operands

    def forward(q: jax.Array, keys: jax.Array, values: jax.Array, new: tuple | None) -> jax.Array:
        return xla.attention(options, q, keys, values, lengths, starts, new)

    *gradients, d_new = jax.vjp(forward, q, keys, values, new)[1](d_out)
    return *gradients, None, None, d_new


_attention.defvjp(_attention_fwd, _attention_bwd)


def _kernels(options: Options, q: jax.Array, keys: jax.Array) -> dict[str, Form | str]:
    """Returns what there is for arrays of such shapes."""
    # Pallas takes half a second to import: only programs that decode pay it.
    from common.kernels.decode_attention import gpu, tpu

    return {
        name: unfit(name, q, keys)
        or module.unfit(q, keys)
        or functools.partial(module.attention, options)
        for name, module in (("tpu", tpu), ("gpu", gpu))
    }


def _check(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
    starts: jax.Array | None,
    window: int | None,
) -> None:
    if q.ndim != 4 or keys.ndim != 4 or keys.shape != values.shape:
        raise UserError(
            "decode_attention needs q [B, T, H, h] and keys, values [B, K, S, h]; got"
            f" {q.shape}, {keys.shape} and {values.shape}"
        )
    batch, queries, heads, width = q.shape
    kv_heads = keys.shape[1]
    if keys.shape[0] != batch or keys.shape[3] != width:
        raise UserError(
            f"decode_attention needs q and keys alike in batch and head width; got {q.shape} and"
            f" {keys.shape}"
        )
    if heads % kv_heads:
        raise UserError(
            f"decode_attention needs query heads a multiple of key heads; got {heads} and"
            f" {kv_heads}"
        )
    for name, array in (("lengths", lengths), ("starts", starts)):
        if array is None:
            continue
        if array.shape != (batch,) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise UserError(
                f"decode_attention needs {name} [{batch}] of integers; got {array.dtype}"
                f" {array.shape}"
            )
    own = (batch, queries, kv_heads, width)
    if new is not None and (new[0].shape != own or new[1].shape != own):
        raise UserError(
            f"decode_attention needs new keys and values {own}; got {new[0].shape} and"
            f" {new[1].shape}"
        )
    if window is not None and window < 1:
        raise UserError(f"decode_attention needs a window of at least 1 key; got {window}")
    for name, array in (("q", q), ("keys", keys), ("values", values)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"decode_attention needs floating inputs; {name} is {array.dtype}")
