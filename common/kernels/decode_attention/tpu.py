"""Decode attention for TPUs (Pallas, Mosaic): one pass over the blocks of the ring that are filled.

The cache is read as it lies, `[B, K, S, h]`: all heads' keys of a block are scored by all queries,
and pairs of unlike heads masked. Few queries leave the matrix unit idle either way, and the memory,
which sets the pace, is read in whole blocks. Where a row's tokens lie is read ahead into scalar
memory, so that the steps beyond them read nothing.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.kernels import flash, tuning
from common.kernels.decode_attention import own_keys, ring
from common.kernels.decode_attention.ring import Options

_LANES = 128
_SUBLANES = 16  # of a tile in 16 bits; in 32 bits they are 8


def unfit(q: jax.Array, keys: jax.Array) -> str | None:
    """Returns why the kernel does not take arrays of such shapes; None if it does."""
    if keys.shape[3] not in (64, 128, 256):
        return f"head width {keys.shape[3]} is not 64, 128 or 256"
    rows = q.shape[1] * q.shape[2] * q.shape[3]
    return f"{q.shape[1]} new tokens x heads = {rows} are above 256" if rows > 256 else None


@functools.partial(jax.jit, static_argnames=("options", "interpret"))
def attention(
    options: Options,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
    *,
    interpret: bool,
) -> jax.Array:
    """Returns `[B, T, K, G, h]` from q `[B, T, K, G, h]` and keys, values `[B, K, S, h]`."""
    batch, queries, kv_heads, group, width = q.shape
    slots = keys.shape[2]
    plan = _plan(options, q, keys, own_in_cache=new is None)
    own = ring.own_positions(lengths, queries, new)
    low = ring.lowest(options, lengths, starts, own, slots)
    first, count = ring.blocks(low, lengths, slots, plan.block)
    rows = kv_heads * queries * group
    merged = own_keys.rows_of(q).reshape(batch, rows, width)
    constants = _constants(plan, kv_heads, queries, group)

    def cache_block(b: Any, n: Any, first: Any, count: Any, *_: Any) -> tuple:
        step = jnp.maximum(jnp.minimum(n, count[b] - 1), 0)
        return b, 0, lax.rem(first[b] + step, plan.blocks), 0

    row = pl.BlockSpec((None, rows, width), lambda b, n, *_: (b, 0, 0))
    cached = pl.BlockSpec((None, kv_heads, plan.block, width), cache_block)
    out, log_sum = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, plan.blocks),
            in_specs=[
                row,
                cached,
                cached,
                *(pl.BlockSpec(x.shape, lambda b, n, *_: (0, 0)) for x in constants),
            ],
            out_specs=[row, pl.BlockSpec((None, rows, 1), lambda b, n, *_: (b, 0, 0))],
            scratch_shapes=[
                pltpu.VMEM((rows, _LANES), jnp.float32),
                pltpu.VMEM((rows, _LANES), jnp.float32),
                pltpu.VMEM((rows, width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="decode_attention",
        interpret=interpret,
    )(
        *(x.astype(jnp.int32) for x in (first, count, lengths, low)),
        merged,
        keys,
        values,
        *constants,
    )
    shape = (batch, kv_heads, queries * group)
    return own_keys.joined(options, q, out.reshape(*shape, width), log_sum.reshape(shape), new)


class _Plan(NamedTuple):
    """The static part of a call.

    Attributes:
      slots, kv_heads, queries: S, K, T.
      block: slots of one step.
      own_in_cache: whether the queries' own keys are in the cache.
    """

    options: Options
    slots: int
    kv_heads: int
    queries: int
    block: int
    own_in_cache: bool

    @property
    def blocks(self) -> int:
        return -(-self.slots // self.block)


def _plan(options: Options, q: jax.Array, keys: jax.Array, *, own_in_cache: bool) -> _Plan:
    _, kv_heads, slots, width = keys.shape
    # Half a megabyte of keys keeps the memory busy while little lies idle at a row's end.
    default = {"rows": 2**19 // (width * keys.dtype.itemsize)}
    shape = {"S": slots, "K": kv_heads, "h": width}
    rows = tuning.blocks(Path(__file__).parent, "forward", keys.dtype, shape, default)["rows"]
    block = max(1, rows // kv_heads // _LANES) * _LANES
    # Whole tiles of keys, so that the heads of a block are merged where they lie.
    whole = -(-slots // _SUBLANES) * _SUBLANES
    return _Plan(options, slots, kv_heads, q.shape[1], min(block, whole), own_in_cache)


def _constants(plan: _Plan, kv_heads: int, queries: int, group: int) -> tuple[np.ndarray, ...]:
    """Returns key head and number of each query, `[M, 2]`, key head and slot of each key, `[2, C]`.

    The division that they take is dear in a kernel.
    """
    rows = np.indices((kv_heads, queries, group)).reshape(3, -1)
    columns = np.indices((kv_heads, plan.block)).reshape(2, -1)
    return rows[:2].T.astype(np.int32), columns.astype(np.int32)


def _kernel(
    plan: _Plan,
    first: Any,
    count: Any,
    lengths: Any,
    lows: Any,
    q: Any,
    keys: Any,
    values: Any,
    rows: Any,
    columns: Any,
    out: Any,
    log_sum: Any,
    maximum: Any,
    total: Any,
    weighted: Any,
) -> None:
    b, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        maximum[...] = jnp.full_like(maximum, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(step < count[b])
    def _() -> None:
        start = lax.rem(first[b] + step, plan.blocks) * plan.block
        k, v = keys[...], values[...]
        k = k.reshape(-1, k.shape[-1])
        scores, _ = flash.scores(q[...], k, plan.options.scale, plan.options.softcap)
        seen = _seen(plan, start, lengths[b], lows[b], rows[...], columns[...])
        scores = jnp.where(seen, scores, -jnp.inf)
        old = maximum[...]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        base = flash.finite(new)
        shrink = jnp.exp2(old - base)
        weights = jnp.exp2(scores - base[:, :1])
        maximum[...] = new
        total[...] = shrink * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        if plan.slots % plan.block:  # What lies beyond the ring is anything, even NaN.
            inside = lax.broadcasted_iota(jnp.int32, v.shape, 1) < plan.slots - start
            v = jnp.where(inside, v, jnp.zeros_like(v))
        v = v.reshape(-1, v.shape[-1])
        weighted[...] = shrink[:, :1] * weighted[...] + flash.contract(weights, v, (1, 0))

    @pl.when(step == plan.blocks - 1)
    def _() -> None:
        sums = total[:, :1]
        empty = sums == 0.0
        sums = jnp.where(empty, 1.0, sums)
        out[...] = weighted[...] / sums
        log = (maximum[:, :1] + jnp.log2(sums)) / flash.LOG2_E
        log_sum[...] = jnp.where(empty, -jnp.inf, log)


def _seen(
    plan: _Plan, start: Any, length: Any, low: Any, rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """Returns which keys of a block count, `[M or 1, C]`."""
    slot = start + columns[1:]
    newest = jnp.maximum(length - 1, 0)
    turn = lax.rem(newest, plan.slots)  # slots up to here are of the ring's present turn
    position = slot + newest - turn - jnp.where(slot > turn, plan.slots, 0)
    seen = (position >= low) & (position < length)
    if plan.slots % plan.block:
        seen &= slot < plan.slots
    if plan.kv_heads > 1:
        seen = seen & (rows[:, :1] == columns[:1])
    if plan.queries > 1:
        own = rows[:, 1:] + (length - plan.queries if plan.own_in_cache else length)
        if plan.own_in_cache:
            seen = seen & (position <= own)
        if plan.options.window is not None:
            seen = seen & (position > own - plan.options.window)
    return seen
