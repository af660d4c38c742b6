"""Attention tile by tile with a running softmax; for long sequences and local windows.

A tile is a block of queries by a block of keys. For each block of queries the loop over blocks of
keys runs only from the first to the last one that its window touches. Where that leaves out little,
a tile has all of the keys: what it takes to hold its scores is used again by the next.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from common.kernels.attention import tile
from common.kernels.attention.cut import Cut, start
from common.kernels.attention.operands import round_up
from common.kernels.attention.options import Options, both, in_window, same_segment

_Segments = tuple[jax.Array, jax.Array]
# As measured on a CPU.
_WORTH_SKIPPING, _STRIP = 0.7, 256
# Of more keys a strip's scores would take too much memory.
_MOST_KEYS = 8192


class _Operands(NamedTuple):
    """What the tiles are cut from, sequence axes rounded up to whole blocks."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: jax.Array | None
    segments: _Segments | None


def tiling(options: Options, queries: int, keys: int, offset: jax.Array | None = None) -> Cut:
    """Cuts into square tiles of 128, or of 256 where a query sees 2048 keys and more.

    Where they would skip less than three tenths of the pairs of at most 8192 keys, the queries are
    cut into equal parts of at most 256, each with all of the keys.
    """
    block = 256 if options.seen(keys) >= 2048 else 128
    square = Cut(options, block, block, queries, keys, start(queries, keys, None))
    if square.work() <= _WORTH_SKIPPING or keys > _MOST_KEYS:
        return square._replace(offset=start(queries, keys, offset))
    part = -(-queries // -(-queries // _STRIP))
    return Cut(options, part, keys, queries, keys, start(queries, keys, offset))


def forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    offset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[B, K, G, T, h]` and the log-sum `[B, K, G, T]`."""
    tiles = tiling(options, q.shape[-2], k.shape[-2], offset)
    operands = _pad(tiles, q, k, v, mask, segments)

    def query_block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple:
        out, log_sum = carry
        q_i = tile.rows_of(_take(operands.q, i, tiles.block_q, axis=-2))

        def key_block(j: jax.Array, running: tuple) -> tuple:
            maximum, total, weighted = running
            k_j, v_j = (_take(value, j, tiles.block_k, axis=-2) for value in operands[1:3])
            allowed = _allowed(tiles, operands, i, j)
            scores = tile.scores_of_rows(options, q_i, k_j, allowed, tiles.block_q)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
            base = tile.finite(new_maximum)
            shrink = jnp.exp(maximum - base)
            weights = jnp.exp(scores - base[..., None])
            share, update = tile.weighted_sum(weights, v_j)
            total = total * shrink + share
            return new_maximum, total, weighted * shrink[..., None] + update

        row = q_i[..., 0]
        running = (
            jnp.full_like(row, -jnp.inf, dtype=jnp.float32),
            jnp.zeros_like(row, dtype=jnp.float32),
            jnp.zeros_like(q_i, dtype=jnp.float32),
        )
        maximum, total, weighted = lax.fori_loop(*tiles.keys_of(i), key_block, running)
        shape = (*q.shape[:3], tiles.block_q)
        one = tile.normalise(total, weighted, out.dtype).reshape(*shape, -1)
        its = tile.log_sum_of(total, tile.finite(maximum)).reshape(shape)
        return _put(out, one, i, axis=-2), _put(log_sum, its, i, axis=-1)

    empty = (jnp.zeros_like(operands.q), jnp.zeros_like(operands.q[..., 0], dtype=jnp.float32))
    count = operands.q.shape[-2] // tiles.block_q
    out, log_sum = lax.fori_loop(0, count, query_block, empty)
    return out[..., : tiles.queries, :], log_sum[..., : tiles.queries]


def backward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    offset: jax.Array | None,
    log_sum: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(dq, dk, dv)`."""
    tiles = tiling(options, q.shape[-2], k.shape[-2], offset)
    operands = _pad(tiles, q, k, v, mask, segments)
    log_sum, delta = (round_up(value, -1, tiles.block_q) for value in (log_sum, delta))
    d_out = round_up(d_out, -2, tiles.block_q)

    def query_block(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        dq, dk, dv = carry
        q_i, d_out_i = (_take(value, i, tiles.block_q, axis=-2) for value in (operands.q, d_out))
        log_sum_i, delta_i = (_take(value, i, tiles.block_q, axis=-1) for value in (log_sum, delta))

        def key_block(j: jax.Array, running: tuple) -> tuple:
            dq_i, dk, dv = running
            k_j, v_j = (_take(value, j, tiles.block_k, axis=-2) for value in operands[1:3])
            allowed = _allowed(tiles, operands, i, j)
            parts = tile.gradients(options, (q_i, k_j, v_j), allowed, log_sum_i, delta_i, d_out_i)
            dk = _put(dk, _take(dk, j, tiles.block_k, axis=-2) + parts[1], j, axis=-2)
            dv = _put(dv, _take(dv, j, tiles.block_k, axis=-2) + parts[2], j, axis=-2)
            return dq_i + parts[0], dk, dv

        running = (jnp.zeros_like(q_i, dtype=jnp.float32), dk, dv)
        dq_i, dk, dv = lax.fori_loop(*tiles.keys_of(i), key_block, running)
        return _put(dq, dq_i.astype(dq.dtype), i, axis=-2), dk, dv

    empty = (
        jnp.zeros_like(operands.q),
        jnp.zeros_like(operands.k, dtype=jnp.float32),
        jnp.zeros_like(operands.v, dtype=jnp.float32),
    )
    count = operands.q.shape[-2] // tiles.block_q
    dq, dk, dv = lax.fori_loop(0, count, query_block, empty)
    dk, dv = dk[..., : tiles.keys, :], dv[..., : tiles.keys, :]
    return dq[..., : tiles.queries, :], dk.astype(k.dtype), dv.astype(v.dtype)


def _allowed(tiles: Cut, operands: _Operands, i: jax.Array, j: jax.Array) -> jax.Array | None:
    """Returns what is allowed in tile `(i, j)`; None for all of it."""
    block_q, block_k = tiles.block_q, tiles.block_k
    key_positions = j * block_k + jnp.arange(block_k)
    query_positions = i * block_q + jnp.arange(block_q) + tiles.offset
    allowed = in_window(tiles.options, query_positions, key_positions)
    if tiles.keys % block_k:
        allowed = both(allowed, (key_positions < tiles.keys)[None, :])
    if operands.segments is not None:
        query_segments, key_segments = operands.segments
        same = same_segment(
            _take(query_segments, i, block_q, axis=-1), _take(key_segments, j, block_k, axis=-1)
        )
        allowed = both(allowed, same)
    mask = operands.mask
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else _take(mask, i, block_q, axis=-2)
        mask = mask if mask.shape[-1] == 1 else _take(mask, j, block_k, axis=-1)
    return both(allowed, mask)


def _pad(
    tiles: Cut,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> _Operands:
    block_q, block_k = tiles.block_q, tiles.block_k
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else round_up(mask, -2, block_q)
        mask = mask if mask.shape[-1] == 1 else round_up(mask, -1, block_k)
    if segments is not None:
        segments = (round_up(segments[0], -1, block_q), round_up(segments[1], -1, block_k))
    q, k, v = round_up(q, -2, block_q), round_up(k, -2, block_k), round_up(v, -2, block_k)
    return _Operands(q, k, v, mask, segments)


def _take(array: jax.Array, index: jax.Array, block: int, *, axis: int) -> jax.Array:
    """Returns block number `index` along `axis`."""
    return lax.dynamic_slice_in_dim(array, index * block, block, axis=axis % array.ndim)


def _put(array: jax.Array, update: jax.Array, index: jax.Array, *, axis: int) -> jax.Array:
    """Writes block number `index` along `axis`."""
    start = index * update.shape[axis]
    return lax.dynamic_update_slice_in_dim(array, update, start, axis=axis % array.ndim)
