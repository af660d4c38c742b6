"""Attention tile by tile with a running softmax; for long sequences and local windows.

A tile is a block of queries by a block of as many keys. For each block of queries the loop over
blocks of keys runs only from the first to the last one that its window touches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from common.kernels.attention import tile
from common.kernels.attention.options import Options, both, in_window, same_segment

_Segments = tuple[jax.Array, jax.Array]


class Tiling(NamedTuple):
    """How a call is cut into tiles."""

    options: Options
    block: int
    queries: int
    keys: int

    def key_blocks(self, i: jax.Array | int) -> tuple[jax.Array | int, jax.Array | int]:
        """Returns the first and the end of the key blocks that query block `i` may see."""
        blocks = -(-self.keys // self.block)
        position = i * self.block + self.keys - self.queries
        first, end = 0, blocks
        if self.options.before is not None:
            first = _clip((position - self.options.before) // self.block, blocks)
        if self.options.after is not None:
            ahead = position + self.block - 1 + self.options.after
            end = _clip(ahead // self.block + 1, blocks)
        return first, end

    def work(self) -> float:
        """Returns the pairs that the tiles compute, relative to all `queries * keys`."""
        bounds = [self.key_blocks(i) for i in range(-(-self.queries // self.block))]
        visited = sum(max(0, int(end) - int(first)) for first, end in bounds)
        return visited * self.block**2 / (self.queries * self.keys)


class _Operands(NamedTuple):
    """What the tiles are cut from, sequence axes rounded up to whole blocks."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: jax.Array | None
    segments: _Segments | None


def tiling(options: Options, queries: int, keys: int) -> Tiling:
    """Cuts into tiles of 128, or of 256 where a query sees 2048 keys and more."""
    seen = keys
    if options.before is not None and options.after is not None:
        seen = min(keys, options.before + 1 + options.after)
    return Tiling(options, 256 if seen >= 2048 else 128, queries, keys)


def forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[B, K, G, T, h]` and the log-sum `[B, K, G, T]`."""
    tiles = tiling(options, q.shape[-2], k.shape[-2])
    operands = _pad(tiles.block, q, k, v, mask, segments)

    def query_block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple:
        out, log_sum = carry
        q_i = _take(operands.q, i, tiles.block, axis=-2)

        def key_block(j: jax.Array, running: tuple) -> tuple:
            maximum, total, weighted = running
            k_j, v_j = (_take(value, j, tiles.block, axis=-2) for value in operands[1:3])
            allowed = _allowed(tiles, operands, i, j)
            scores = tile.masked(tile.raw_scores(options, q_i, k_j), allowed)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
            base = tile.finite(new_maximum)
            shrink = jnp.exp(maximum - base)
            weights = jnp.exp(scores - base[..., None])
            update = tile.product("bkgts,bksh->bkgth", weights, v_j)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new_maximum, total, weighted * shrink[..., None] + update

        row = q_i[..., 0]
        running = (
            jnp.full_like(row, -jnp.inf, dtype=jnp.float32),
            jnp.zeros_like(row, dtype=jnp.float32),
            jnp.zeros_like(q_i, dtype=jnp.float32),
        )
        maximum, total, weighted = lax.fori_loop(*tiles.key_blocks(i), key_block, running)
        out = _put(out, tile.normalise(total, weighted, out.dtype), i, axis=-2)
        return out, _put(log_sum, tile.log_sum_of(total, tile.finite(maximum)), i, axis=-1)

    start = (jnp.zeros_like(operands.q), jnp.zeros_like(operands.q[..., 0], dtype=jnp.float32))
    count = operands.q.shape[-2] // tiles.block
    out, log_sum = lax.fori_loop(0, count, query_block, start)
    return out[..., : tiles.queries, :], log_sum[..., : tiles.queries]


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
    tiles = tiling(options, q.shape[-2], k.shape[-2])
    operands = _pad(tiles.block, q, k, v, mask, segments)
    log_sum, delta = (_round_up(value, -1, tiles.block) for value in (log_sum, delta))
    d_out = _round_up(d_out, -2, tiles.block)

    def query_block(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        dq, dk, dv = carry
        q_i, d_out_i = (_take(value, i, tiles.block, axis=-2) for value in (operands.q, d_out))
        log_sum_i, delta_i = (_take(value, i, tiles.block, axis=-1) for value in (log_sum, delta))

        def key_block(j: jax.Array, running: tuple) -> tuple:
            dq_i, dk, dv = running
            k_j, v_j = (_take(value, j, tiles.block, axis=-2) for value in operands[1:3])
            allowed = _allowed(tiles, operands, i, j)
            parts = tile.gradients(options, (q_i, k_j, v_j), allowed, log_sum_i, delta_i, d_out_i)
            dk = _put(dk, _take(dk, j, tiles.block, axis=-2) + parts[1], j, axis=-2)
            dv = _put(dv, _take(dv, j, tiles.block, axis=-2) + parts[2], j, axis=-2)
            return dq_i + parts[0], dk, dv

        running = (jnp.zeros_like(q_i, dtype=jnp.float32), dk, dv)
        dq_i, dk, dv = lax.fori_loop(*tiles.key_blocks(i), key_block, running)
        return _put(dq, dq_i.astype(dq.dtype), i, axis=-2), dk, dv

    start = (
        jnp.zeros_like(operands.q),
        jnp.zeros_like(operands.k, dtype=jnp.float32),
        jnp.zeros_like(operands.v, dtype=jnp.float32),
    )
    count = operands.q.shape[-2] // tiles.block
    dq, dk, dv = lax.fori_loop(0, count, query_block, start)
    dk, dv = dk[..., : tiles.keys, :], dv[..., : tiles.keys, :]
    return dq[..., : tiles.queries, :], dk.astype(k.dtype), dv.astype(v.dtype)


def _allowed(tiles: Tiling, operands: _Operands, i: jax.Array, j: jax.Array) -> jax.Array | None:
    """Returns what is allowed in tile `(i, j)`; None for all of it."""
    block = tiles.block
    key_positions = j * block + jnp.arange(block)
    query_positions = i * block + jnp.arange(block) + tiles.keys - tiles.queries
    allowed = in_window(tiles.options, query_positions, key_positions)
    if tiles.keys % block:
        allowed = both(allowed, (key_positions < tiles.keys)[None, :])
    if operands.segments is not None:
        query_segments, key_segments = operands.segments
        same = same_segment(
            _take(query_segments, i, block, axis=-1), _take(key_segments, j, block, axis=-1)
        )
        allowed = both(allowed, same)
    mask = operands.mask
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else _take(mask, i, block, axis=-2)
        mask = mask if mask.shape[-1] == 1 else _take(mask, j, block, axis=-1)
    return both(allowed, mask)


def _pad(
    block: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
) -> _Operands:
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else _round_up(mask, -2, block)
        mask = mask if mask.shape[-1] == 1 else _round_up(mask, -1, block)
    if segments is not None:
        segments = (_round_up(segments[0], -1, block), _round_up(segments[1], -1, block))
    q, k, v = (_round_up(value, -2, block) for value in (q, k, v))
    return _Operands(q, k, v, mask, segments)


def _round_up(array: jax.Array, axis: int, block: int) -> jax.Array:
    """Pads one axis with zeros to a multiple of `block`."""
    missing = -array.shape[axis] % block
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def _clip(block: jax.Array | int, blocks: int) -> jax.Array | int:
    return min(max(block, 0), blocks) if isinstance(block, int) else jnp.clip(block, 0, blocks)


def _take(array: jax.Array, index: jax.Array, block: int, *, axis: int) -> jax.Array:
    """Returns block number `index` along `axis`."""
    return lax.dynamic_slice_in_dim(array, index * block, block, axis=axis % array.ndim)


def _put(array: jax.Array, update: jax.Array, index: jax.Array, *, axis: int) -> jax.Array:
    """Writes block number `index` along `axis`."""
    start = index * update.shape[axis]
    return lax.dynamic_update_slice_in_dim(array, update, start, axis=axis % array.ndim)
