"""Flash attention for TPUs: the forward kernel and the two of the gradient, in Pallas (Mosaic).

The grid runs over batch, heads and the list of tiles that the window leaves (`cut.visits`, read
ahead into scalar memory): a tile outside costs neither a step nor a read. Consecutive visits of one
outer block accumulate in VMEM. Query heads of a group read the same keys; nothing is repeated.

What belongs to queries one number each (log-sum, segments) lies along lanes, `[.., 1, T]`. The
forward and the dq kernel turn it into columns; the dk/dv kernel works on transposed scores.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.kernels import flash, tuning
from common.kernels.attention import tile
from common.kernels.attention.cut import ACTIVE, FIRST, LAST, WHOLE, Cut, Visits, start, visits
from common.kernels.attention.operands import Operands, padded
from common.kernels.attention.options import Options, both

_Segments = tuple[jax.Array, jax.Array]
_LANES = 128
_MOST = 2**17  # tiles listed in scalar memory, of a megabyte


def unfit(options: Options, q: jax.Array, k: jax.Array, offset: jax.Array | None) -> str | None:
    """Returns why the list of tiles is too long; None if it is short enough."""
    for kernel in ("forward", "backward_q", "backward_kv"):
        cut = _cut(kernel, options, q, k, offset)
        if math.prod(cut.blocks) <= _MOST:
            continue
        tiles = visits(cut, by_keys=False).flags.size
        if tiles > _MOST:
            return f"{q.shape[-2]} queries over {k.shape[-2]} keys are {tiles} tiles, above {_MOST}"
    return None


@functools.partial(jax.jit, static_argnames=("options", "interpret"))
def forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segments: _Segments | None,
    offset: jax.Array | None,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[B, K, G, T, h]` and the log-sum `[B, K, G, T]`."""
    cut = _cut("forward", options, q, k, offset)
    operands = padded(cut, _width(q), q, k, v, mask, segments)
    row = jax.ShapeDtypeStruct((*operands.q.shape[:3], 1, operands.q.shape[3]), jnp.float32)
    out, log_sum = _call(
        _forward_kernel,
        cut,
        operands,
        by_keys=False,
        outputs={"query": operands.q, "row": row},
        scratch=[_LANES, _LANES, operands.q.shape[-1]],
        interpret=interpret,
    )
    queries, width = q.shape[-2:]
    return out[..., :queries, :width], log_sum[..., 0, :queries]


@functools.partial(jax.jit, static_argnames=("options", "interpret"))
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
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(dq, dk, dv)`."""
    width = q.shape[-1]
    rows = (log_sum * flash.LOG2_E, delta, d_out)
    cut = _cut("backward_q", options, q, k, offset)
    operands = padded(cut, _width(q), q, k, v, mask, segments, *rows)
    (dq,) = _call(
        _dq_kernel,
        cut,
        operands,
        by_keys=False,
        outputs={"query": operands.q},
        scratch=[operands.q.shape[-1]],
        interpret=interpret,
    )
    cut = _cut("backward_kv", options, q, k, offset)
    operands = padded(cut, _width(q), q, k, v, mask, segments, *rows)
    dk, dv = _call(
        _dkv_kernel,
        cut,
        operands,
        by_keys=True,
        outputs={"key": operands.k, "value": operands.v},
        scratch=[operands.k.shape[-1]] * 2,
        interpret=interpret,
    )
    keys = k.shape[-2]
    return dq[..., : q.shape[-2], :width], dk[..., :keys, :width], dv[..., :keys, :width]


def _cut(
    kernel: str, options: Options, q: jax.Array, k: jax.Array, offset: jax.Array | None
) -> Cut:
    queries, keys, width = q.shape[-2], k.shape[-2], q.shape[-1]
    default = {"queries": 512, "keys": 512 if k.dtype.itemsize == 2 or width <= 128 else 256}
    shape = {"T": queries, "S": keys, "W": options.seen(keys), "h": width}
    blocks = tuning.blocks(Path(__file__).parent, kernel, k.dtype, shape, default)
    # Lanes come in 128, and so do the blocks along them; few queries are one block of their own.
    unit = _LANES if queries > _LANES else 16
    block_q = min(blocks["queries"], -(-queries // unit) * unit)
    block_k = min(blocks["keys"], -(-keys // _LANES) * _LANES)
    return Cut(options, block_q, block_k, queries, keys, start(queries, keys, offset))


def _width(q: jax.Array) -> int:
    return next(width for width in (64, 128, 256) if q.shape[-1] <= width)


def _call(
    kernel: Callable[..., None],
    cut: Cut,
    operands: Operands,
    *,
    by_keys: bool,
    outputs: dict[str, Any],
    scratch: list[int],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel over all visits.

    Args:
      kernel: takes `_Visit`, `Operands` of refs, then its outputs and scratch.
      by_keys: whether blocks of keys are the outer ones; the group's heads then lie innermost,
        since they add to the same gradient.
      outputs: by their kind of block ("query", "key", "value", "row"), arrays of their shapes.
      scratch: lanes of each float32 accumulator; it has as many rows as the outer block.
    """
    listed = _packed(visits(cut, by_keys=by_keys))
    batch, kv_heads, group = operands.q.shape[:3]
    steps = (listed.size, group) if by_keys else (group, listed.size)

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        if by_keys:
            return pl.BlockSpec(
                shape, lambda b, k, n, g, tiles, _: index(b, k, g, *_place(tiles[n], by_keys))
            )
        return pl.BlockSpec(
            shape, lambda b, k, g, n, tiles, _: index(b, k, g, *_place(tiles[n], by_keys))
        )

    width = operands.q.shape[-1]
    query = spec((None, None, None, cut.block_q, width), lambda b, k, g, i, j: (b, k, g, i, 0))
    key = spec((None, None, cut.block_k, width), lambda b, k, g, i, j: (b, k, j, 0))
    row = spec((None, None, None, 1, cut.block_q), lambda b, k, g, i, j: (b, k, g, 0, i))
    every = Operands(
        q=query,
        k=key,
        v=key,
        mask=None if operands.mask is None else spec(*_mask_block(cut, operands.mask.shape)),
        query_segments=spec((None, 1, cut.block_q), lambda b, k, g, i, j: (b, 0, i)),
        key_segments=spec((None, 1, cut.block_k), lambda b, k, g, i, j: (b, 0, j)),
        log_sum=row,
        delta=row,
        d_out=query,
    )
    specs = Operands(*(None if x is None else s for s, x in zip(every, operands)))
    kinds = {"query": query, "key": key, "value": key, "row": row}
    rows = cut.block_k if by_keys else cut.block_q

    def body(*refs: Any) -> None:
        tiles, offset = refs[:2]
        n, g = (pl.program_id(axis) for axis in ((2, 3) if by_keys else (3, 2)))
        (i, j), flag = _place(tiles[n], by_keys), tiles[n]
        first, last = (flag & FIRST) != 0, (flag & LAST) != 0
        if by_keys:
            first, last = first & (g == 0), last & (g == group - 1)
        position = i * cut.block_q + offset[0] - j * cut.block_k
        kernel(_Visit(cut, flag, first, last, position, j), *refs[2:])

    offset = jnp.asarray(cut.offset, jnp.int32)[None]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, *steps),
            in_specs=[specs],
            out_specs=[kinds[kind] for kind in outputs],
            scratch_shapes=[pltpu.VMEM((rows, lanes), jnp.float32) for lanes in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
            + (("arbitrary", "arbitrary") if by_keys else ("parallel", "arbitrary"))
        ),
        name=f"attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=interpret,
    )(listed, offset, operands)


def _packed(listed: Visits) -> Any:
    """Packs each visit into 32 bits: scalar memory is small."""
    return listed.outer << 18 | listed.inner << 4 | listed.flags


def _place(packed: Any, by_keys: bool) -> tuple[Any, Any]:
    """Returns the block of queries and the block of keys."""
    outer, inner = lax.shift_right_logical(packed, 18), (packed >> 4) & (2**14 - 1)
    return (inner, outer) if by_keys else (outer, inner)


def _mask_block(cut: Cut, shape: tuple[int, ...]) -> tuple[tuple[int | None, ...], Callable]:
    """Returns block and index map of a mask, whose axes of size 1 stand for all."""
    full = [size > 1 for size in shape]

    def index(*at: Any) -> tuple:
        return tuple(place if wide else 0 for place, wide in zip(at, full))

    block_q, block_k = (b if wide else 1 for b, wide in zip((cut.block_q, cut.block_k), full[3:]))
    return (None, None, None, block_q, block_k), index


class _Visit(NamedTuple):
    """One step of the grid: the tile and what is known about it."""

    cut: Cut
    flag: Any
    first: Any
    last: Any
    position: Any  # of the first query, counted from the tile's first key
    key_block: Any

    def run(
        self, operands: Operands, compute: Callable[[jax.Array | None], None], *, transposed: bool
    ) -> None:
        """Calls `compute(allowed)` if there is anything to compute."""

        def with_mask(bounded: bool) -> Callable[[], None]:
            return lambda: compute(self._allowed(operands, bounded, transposed))

        active = (self.flag & ACTIVE) != 0
        if operands.mask is not None or operands.query_segments is not None or not self.cut.bounded:
            pl.when(active)(with_mask(self.cut.bounded))
        else:
            whole = (self.flag & WHOLE) != 0
            pl.when(active & whole)(with_mask(False))
            pl.when(active & ~whole)(with_mask(True))

    def _allowed(self, operands: Operands, bounded: bool, transposed: bool) -> jax.Array | None:
        """Returns which pairs count, `[block_q, block_k]` or transposed; None for all."""
        cut = self.cut
        shape = (cut.block_k, cut.block_q) if transposed else (cut.block_q, cut.block_k)
        allowed = None
        if bounded:
            key = lax.broadcasted_iota(jnp.int32, shape, 0 if transposed else 1)
            ahead = key - lax.broadcasted_iota(jnp.int32, shape, 1 if transposed else 0)
            if cut.options.before is not None:
                allowed = ahead >= self.position - cut.options.before
            if cut.options.after is not None:
                allowed = both(allowed, ahead <= self.position + cut.options.after)
            if cut.keys % cut.block_k:
                allowed = both(allowed, key < cut.keys - self.key_block * cut.block_k)
        if operands.query_segments is not None:
            queries, keys = operands.query_segments[...], operands.key_segments[...]
            same = _column(keys) == queries if transposed else _column(queries) == keys
            allowed = both(allowed, same)
        if operands.mask is not None:
            mask = operands.mask[...].astype(jnp.int32)
            allowed = both(allowed, (mask.T if transposed else mask) != 0)
        return allowed


def _column(row: jax.Array) -> jax.Array:
    """Turns `[1, n]` into `[n, 1]`."""
    return row[0][:, None]


def _spread(value: jax.Array, width: int) -> jax.Array:
    """Widens a column that is repeated over the lanes, `[n, 128]`, to `[n, width]`."""
    return jnp.tile(value, (1, -(-width // _LANES)))[:, :width]


def _scores(
    options: Options, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    return flash.scores(left, right, options.scale, options.softcap)


def _forward_kernel(
    visit: _Visit,
    operands: Operands,
    out: Any,
    log_sum: Any,
    maximum: Any,
    total: Any,
    weighted: Any,
) -> None:
    @pl.when(visit.first)
    def _() -> None:
        maximum[...] = jnp.full_like(maximum, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def add(allowed: jax.Array | None) -> None:
        scores, _ = _scores(visit.cut.options, operands.q[...], operands.k[...])
        scores = tile.masked(scores, allowed)
        old = maximum[...]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        base = flash.finite(new)
        shrink = jnp.exp2(old - base)
        weights = jnp.exp2(scores - _spread(base, scores.shape[1]))
        maximum[...] = new
        total[...] = shrink * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        update = flash.contract(weights, operands.v[...], (1, 0))
        weighted[...] = _spread(shrink, weighted.shape[1]) * weighted[...] + update

    visit.run(operands, add, transposed=False)

    @pl.when(visit.last)
    def _() -> None:
        sums = total[...]
        empty = sums == 0.0
        inverse = 1.0 / jnp.where(empty, 1.0, sums)
        out[...] = (weighted[...] * _spread(inverse, weighted.shape[1])).astype(out.dtype)
        log = (maximum[...] + jnp.log2(jnp.where(empty, 1.0, sums))) / flash.LOG2_E
        log_sum[...] = jnp.where(empty, jnp.inf, log).T[:1]


def _dq_kernel(visit: _Visit, operands: Operands, dq: Any, total: Any) -> None:
    @pl.when(visit.first)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add(allowed: jax.Array | None) -> None:
        k = operands.k[...]
        scores, tanh = _scores(visit.cut.options, operands.q[...], k)
        weights = jnp.exp2(tile.masked(scores, allowed) - _column(operands.log_sum[...]))
        d_weights = flash.contract(operands.d_out[...], operands.v[...], (1, 1))
        d_scores = weights * (d_weights - _column(operands.delta[...]))
        if tanh is not None:
            d_scores *= 1.0 - tanh * tanh
        total[...] += flash.contract(d_scores, k, (1, 0))

    visit.run(operands, add, transposed=False)

    @pl.when(visit.last)
    def _() -> None:
        dq[...] = (visit.cut.options.scale * total[...]).astype(dq.dtype)


def _dkv_kernel(
    visit: _Visit, operands: Operands, dk: Any, dv: Any, dk_total: Any, dv_total: Any
) -> None:
    @pl.when(visit.first)
    def _() -> None:
        dk_total[...] = jnp.zeros_like(dk_total)
        dv_total[...] = jnp.zeros_like(dv_total)

    def add(allowed: jax.Array | None) -> None:
        v = operands.v[...]
        q, d_out = operands.q[...].astype(v.dtype), operands.d_out[...].astype(v.dtype)
        scores, tanh = _scores(visit.cut.options, operands.k[...], q)
        weights = jnp.exp2(tile.masked(scores, allowed) - operands.log_sum[...])
        dv_total[...] += flash.contract(weights, d_out, (1, 0))
        d_scores = weights * (flash.contract(v, d_out, (1, 1)) - operands.delta[...])
        if tanh is not None:
            d_scores *= 1.0 - tanh * tanh
        dk_total[...] += flash.contract(d_scores, q, (1, 0))

    visit.run(operands, add, transposed=True)

    @pl.when(visit.last)
    def _() -> None:
        dk[...] = (visit.cut.options.scale * dk_total[...]).astype(dk.dtype)
        dv[...] = dv_total[...].astype(dv.dtype)
