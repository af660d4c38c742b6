"""Scaled dot-product attention with grouped heads, windows, soft cap, masks and segments.

One function, `attention`, with one gradient rule, which keeps only the output and the log of the
softmax's denominator; what runs underneath is chosen by `implementation`. Implementations take the
arrays with grouped heads, `[B, K, G, T, h]` against `[B, K, S, h]`, and `Options`: `forward` and
`backward` of `xla.py`, `tpu.py` and `gpu.py` have the same signatures.
"""

import functools

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.kernels.attention import reference, xla
from common.kernels.attention.options import Options, grouped_mask
from common.kernels.dispatch import Form, check_implementation, dispatch, unfit


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    offset: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Returns softmax(q k^T) v for each query head, its keys shared by a group of `H / K` heads.

    The last query stands at the last key: query `t` has the position of key `t + S - T`, or of
    key `t + offset`. Scores and softmax are float32. A query with no
    allowed key gives zeros, and no gradient.

    Args:
        q: Queries `[B, T, H, h]`.
        k: Keys `[B, S, K, h]`, `H` a multiple of `K`.
        v: Values `[B, S, K, h]`.
        causal: Hides the keys after the query's own position.
        window: `W` leaves the `W` keys up to and including the query's own position, none after
            it; `(before, after)` leaves so many keys on each side besides its own position.
        softcap: Bounds scores by `softcap * tanh(score / softcap)`.
        scale: Factor of the scores; `h ** -0.5` when absent.
        mask: Boolean, broadcastable to `[B, H, T, S]`; True where a query may see a key.
        segment_ids: `[B, S]` for queries and keys alike, or a pair `[B, T]`, `[B, S]`; a query
            sees the keys of its own segment.
        offset: Key position of the first query, an int32 scalar, where the queries are a part of a
            longer sequence (one device's, say); `S - T` when absent.
        implementation: "reference", "xla", "tpu", "gpu", or None for the fastest of the platform
            that the program is compiled for. A kernel named on another platform is interpreted.

    Returns:
        `[B, T, H, h]` in the dtype of `q`.

    Raises:
        UserError: A shape, dtype, window or implementation that does not fit.
    """
    check_implementation("attention", implementation)
    _check_arrays(q, k, v)
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    options = Options(
        float(width**-0.5 if scale is None else scale),
        None if softcap is None else float(softcap),
        *_bounds(causal, window),
    )
    mask = _checked_mask(mask, (batch, heads, queries, keys))
    if mask is not None:
        mask = grouped_mask(mask, kv_heads)
    segments = _checked_segments(segment_ids, batch, queries, keys)
    if implementation in (None, "gpu"):
        from common.kernels.attention import vendor

        if vendor.preferred(options, q, k, mask, segments, offset):
            return vendor.attention(options, q, k, v)
    q_grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    q_grouped = jnp.transpose(q_grouped, (0, 2, 3, 1, 4))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    operands = (q_grouped, k, v, mask, segments, offset)
    if implementation == "reference":
        out = reference.attention(options, *operands)
    else:
        out = _attention(options, implementation, *operands)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(q.shape)


_Segments = tuple[jax.Array, jax.Array]
_WIDEST = 256  # heads that leave room for two blocks in fast memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    options: Options,
    name: str | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    offset: jax.Array | None,
) -> jax.Array:
    return _attention_fwd(options, name, q, k, v, mask, segments, offset)[0]


def _attention_fwd(
    options: Options,
    name: str | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    offset: jax.Array | None,
) -> tuple[jax.Array, tuple]:
    operands = (q, k, v, mask, segments, offset)
    kernels = _kernels("forward", name, options, q, k, offset)
    default = functools.partial(xla.forward, options)
    out, log_sum = dispatch("attention", name, *operands, xla=default, **kernels)
    return out, (*operands, out, log_sum)


def _attention_bwd(
    options: Options, name: str | None, residuals: tuple, d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    *operands, out, log_sum = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    kernels = _kernels("backward", name, options, operands[0], operands[1], operands[5])
    default = functools.partial(xla.backward, options)
    operands += (log_sum, delta, d_out)
    gradients = dispatch("attention", name, *operands, xla=default, **kernels)
    return *gradients, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _kernels(
    direction: str,
    name: str | None,
    options: Options,
    q: jax.Array,
    k: jax.Array,
    offset: jax.Array | None,
) -> dict[str, Form | str]:
    """Returns what there is for arrays of such shapes, if it can be meant by `name`."""
    # Pallas takes half a second to import: only programs with attention pay it.
    from common.kernels.attention import gpu, tpu

    forms: dict[str, Form | str] = {}
    for platform, module in (("tpu", tpu), ("gpu", gpu)):
        why = unfit(platform, q, k)
        if not why and q.shape[-1] > _WIDEST:
            why = f"head width {q.shape[-1]} is above {_WIDEST}"
        if not why and platform == "tpu" and name in (None, "tpu"):
            why = tpu.unfit(options, q, k, offset)
        forms[platform] = why or functools.partial(getattr(module, direction), options)
    return forms


def _bounds(causal: bool, window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    """Returns how many keys before and after its own position a query sees; None: all."""
    if window is None:
        return None, 0 if causal else None
    if isinstance(window, int):
        if window < 1:
            raise UserError(f"attention needs a window of at least 1 key; got {window}")
        return window - 1, 0
    if len(window) != 2 or min(window) < 0:
        raise UserError(f"attention needs a window of (before, after), both >= 0; got {window}")
    before, after = window
    return before, 0 if causal else after


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise UserError(
            f"attention needs q [B, T, H, h] and k, v [B, S, K, h]; got {q.shape} and {k.shape}"
            " (use jax.vmap for more leading axes)"
        )
    if k.shape != v.shape:
        raise UserError(f"attention needs k and v of one shape; got {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(
            f"attention needs q and k alike in batch and head width; got {q.shape} and {k.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise UserError(
            f"attention needs query heads a multiple of key heads; got {q.shape[2]} and"
            f" {k.shape[2]}"
        )
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"attention needs floating inputs; {name} is {array.dtype}")


def _checked_mask(mask: jax.Array | None, shape: tuple[int, int, int, int]) -> jax.Array | None:
    """Returns the mask with four axes, each of full size or 1."""
    if mask is None:
        return None
    if mask.dtype != jnp.bool_:
        raise UserError(f"attention needs a boolean mask (True: visible); got {mask.dtype}")
    full = (1,) * (4 - mask.ndim) + mask.shape
    if len(full) != 4 or any(have not in (1, want) for have, want in zip(full, shape)):
        raise UserError(
            f"attention needs a mask broadcastable to [B, H, T, S] = {shape}; got {mask.shape}"
        )
    return mask.reshape(full)


def _checked_segments(
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None,
    batch: int,
    queries: int,
    keys: int,
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the pair of query and key segments."""
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    shapes = tuple(part.shape for part in pair)
    if shapes != ((batch, queries), (batch, keys)):
        raise UserError(
            "attention needs segment_ids [B, S] with T = S, or a pair [B, T] and [B, S], here"
            f" {(batch, queries)} and {(batch, keys)}; got {' and '.join(map(str, shapes))}"
        )
    return pair
