"""Attention tile by tile with a running softmax; for long sequences and local windows.

A tile is `QUERY_BLOCK` queries by `KEY_BLOCK` keys. For each block of queries the loop over key
blocks runs only from the first to the last one that its window touches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from common.kernels.attention import tile
from common.kernels.attention.options import Options, both, in_window, same_segment

QUERY_BLOCK = 256
KEY_BLOCK = 256

_Segments = tuple[jax.Array, jax.Array]


class _Padded(NamedTuple):
    """The operands, their sequence axes rounded up to whole blocks."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: jax.Array | None
    segments: _Segments | None


def forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[B, K, G, T, h]` and the log-sum `[B, K, G, T]`."""
    queries, keys = q.shape[-2], k.shape[-2]
    padded = _pad(q, k, v, mask, segments)

    def query_block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple:
        out, log_sum = carry
        start = i * QUERY_BLOCK
        q_i = _take(padded.q, start, QUERY_BLOCK, axis=-2)

        def key_block(j: jax.Array, running: tuple) -> tuple:
            maximum, total, weighted = running
            first = j * KEY_BLOCK
            scores = tile.raw_scores(options, q_i, _take(padded.k, first, KEY_BLOCK, axis=-2))
            scores = tile.masked(
                scores, _allowed(options, padded, start, first, queries=queries, keys=keys)
            )
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
            # Rows that have seen nothing yet are at minus infinity; subtract 0 there.
            base = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
            shrink = jnp.exp(maximum - base)
            weights = jnp.exp(scores - base[..., None])
            values = _take(padded.v, first, KEY_BLOCK, axis=-2)
            update = tile.product("bkgts,bksh->bkgth", weights, values)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new_maximum, total, weighted * shrink[..., None] + update

        rows = q_i.shape[:-1]
        running = (
            jnp.full(rows, -jnp.inf, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(q_i.shape, jnp.float32),
        )
        maximum, total, weighted = lax.fori_loop(
            *_key_blocks(options, i, queries, keys), key_block, running
        )
        base = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
        out = _put(out, tile.normalise(total, weighted, out.dtype), start, axis=-2)
        return out, _put(log_sum, tile.log_sum_of(total, base), start, axis=-1)

    start = (jnp.zeros_like(padded.q), jnp.zeros(padded.q.shape[:-1], jnp.float32))
    count = padded.q.shape[-2] // QUERY_BLOCK
    out, log_sum = lax.fori_loop(0, count, query_block, start)
    return out[..., :queries, :], log_sum[..., :queries]


def backward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    log_sum: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(dq, dk, dv)`."""
    queries, keys = q.shape[-2], k.shape[-2]
    padded = _pad(q, k, v, mask, segments)
    log_sum, delta = (_round_up(value, -1, QUERY_BLOCK) for value in (log_sum, delta))
    d_out = _round_up(d_out, -2, QUERY_BLOCK)

    def query_block(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        dq, dk, dv = carry
        start = i * QUERY_BLOCK
        q_i, d_out_i = (_take(value, start, QUERY_BLOCK, axis=-2) for value in (padded.q, d_out))
        log_sum_i, delta_i = (
            _take(value, start, QUERY_BLOCK, axis=-1) for value in (log_sum, delta)
        )

        def key_block(j: jax.Array, running: tuple) -> tuple:
            dq_i, dk, dv = running
            first = j * KEY_BLOCK
            k_j, v_j = (_take(value, first, KEY_BLOCK, axis=-2) for value in (padded.k, padded.v))
            allowed = _allowed(options, padded, start, first, queries=queries, keys=keys)
            dq_ij, dk_ij, dv_ij = tile.gradients(
                options, (q_i, k_j, v_j), allowed, log_sum_i, delta_i, d_out_i
            )
            dk = _put(dk, _take(dk, first, KEY_BLOCK, axis=-2) + dk_ij, first, axis=-2)
            dv = _put(dv, _take(dv, first, KEY_BLOCK, axis=-2) + dv_ij, first, axis=-2)
            return dq_i + dq_ij, dk, dv

        bounds = _key_blocks(options, i, queries, keys)
        running = (jnp.zeros(q_i.shape, jnp.float32), dk, dv)
        dq_i, dk, dv = lax.fori_loop(*bounds, key_block, running)
        return _put(dq, dq_i.astype(dq.dtype), start, axis=-2), dk, dv

    zeros = (jnp.zeros(value.shape, jnp.float32) for value in (padded.k, padded.v))
    count = padded.q.shape[-2] // QUERY_BLOCK
    dq, dk, dv = lax.fori_loop(0, count, query_block, (jnp.zeros_like(padded.q), *zeros))
    dk, dv = dk[..., :keys, :], dv[..., :keys, :]
    return dq[..., :queries, :], dk.astype(k.dtype), dv.astype(v.dtype)


def visited_fraction(options: Options, queries: int, keys: int) -> float:
    """Returns the share of all tiles that the loops visit."""
    count = -(-queries // QUERY_BLOCK)
    bounds = [_key_blocks(options, i, queries, keys) for i in range(count)]
    visited = sum(max(0, int(last) - int(first)) for first, last in bounds)
    return visited / (count * -(-keys // KEY_BLOCK))


def _key_blocks(
    options: Options, i: jax.Array | int, queries: int, keys: int
) -> tuple[jax.Array | int, jax.Array | int]:
    """Returns the first and the end of the key blocks that query block `i` may see."""
    blocks = -(-keys // KEY_BLOCK)
    position = i * QUERY_BLOCK + keys - queries
    first, last = 0, blocks
    if options.before is not None:
        first = _clip((position - options.before) // KEY_BLOCK, blocks)
    if options.after is not None:
        last = _clip((position + QUERY_BLOCK - 1 + options.after) // KEY_BLOCK + 1, blocks)
    return first, last


def _clip(block: jax.Array | int, blocks: int) -> jax.Array | int:
    if isinstance(block, int):
        return min(max(block, 0), blocks)
    return jnp.clip(block, 0, blocks)


def _allowed(
    options: Options,
    padded: _Padded,
    start: jax.Array,
    first: jax.Array,
    *,
    queries: int,
    keys: int,
) -> jax.Array | None:
    """Returns what is allowed in the tile at query `start` and key `first`; None for all of it."""
    key_positions = first + jnp.arange(KEY_BLOCK)
    query_positions = start + jnp.arange(QUERY_BLOCK) + keys - queries
    allowed = in_window(options, query_positions, key_positions)
    if keys % KEY_BLOCK:
        allowed = both(allowed, (key_positions < keys)[None, :])
    if padded.segments is not None:
        query_segments = _take(padded.segments[0], start, QUERY_BLOCK, axis=-1)
        key_segments = _take(padded.segments[1], first, KEY_BLOCK, axis=-1)
        allowed = both(allowed, same_segment(query_segments, key_segments))
    if padded.mask is not None:
        mask = padded.mask
        if mask.shape[-2] > 1:
            mask = _take(mask, start, QUERY_BLOCK, axis=-2)
        if mask.shape[-1] > 1:
            mask = _take(mask, first, KEY_BLOCK, axis=-1)
        allowed = both(allowed, mask)
    return allowed


def _pad(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> _Padded:
    if mask is not None and mask.shape[-2] > 1:
        mask = _round_up(mask, -2, QUERY_BLOCK)
    if mask is not None and mask.shape[-1] > 1:
        mask = _round_up(mask, -1, KEY_BLOCK)
    if segments is not None:
        segments = (
            _round_up(segments[0], -1, QUERY_BLOCK),
            _round_up(segments[1], -1, KEY_BLOCK),
        )
    return _Padded(
        _round_up(q, -2, QUERY_BLOCK),
        _round_up(k, -2, KEY_BLOCK),
        _round_up(v, -2, KEY_BLOCK),
        mask,
        segments,
    )


def _round_up(array: jax.Array, axis: int, block: int) -> jax.Array:
    """Pads one axis with zeros to a multiple of `block`."""
    missing = -array.shape[axis] % block
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def _take(array: jax.Array, start: jax.Array, size: int, *, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, size, axis=axis % array.ndim)


def _put(array: jax.Array, update: jax.Array, start: jax.Array, *, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, update, start, axis=axis % array.ndim)
