"""Decode attention for GPUs (Pallas, Triton): the filled part of each ring, split over programs.

A program scores the queries of one key head against its share of a row's filled blocks; shares are
cut evenly from what is filled, so that rows of unlike length cost what they hold. The shares'
results, a few numbers each, are joined outside.
"""

import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from common.kernels import flash, tuning
from common.kernels.attention.operands import round_up
from common.kernels.decode_attention import own_keys, ring
from common.kernels.decode_attention.ring import Options

warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

_LEAST = 16  # rows of a tensor core's product
_PROGRAMS = 264  # that keep a large GPU busy
_BLOCK_BYTES = 2**14  # of keys; two arrays in three stages then leave room for two programs


def unfit(q: jax.Array, keys: jax.Array) -> str | None:
    """Returns why the kernel does not take arrays of such shapes; None if it does."""
    if keys.shape[3] not in (16, 32, 64, 128, 256):
        return f"head width {keys.shape[3]} is not 16, 32, 64, 128 or 256"
    rows = q.shape[1] * q.shape[3]
    if rows > 128:
        return f"{q.shape[1]} new tokens x heads of one key head = {rows} are above 128"
    return None


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
    fitting = min(128, max(_LEAST, _BLOCK_BYTES // (width * keys.dtype.itemsize)))
    default = {"keys": fitting, "least": 128, "warps": 4, "stages": 3}
    shape = {"S": slots, "K": kv_heads, "h": width}
    blocks = tuning.blocks(Path(__file__).parent, "forward", keys.dtype, shape, default)
    block = blocks["keys"]
    keys, values = (round_up(x, 2, block) if slots < block else x for x in (keys, values))
    shares = max(1, min(_PROGRAMS // (batch * kv_heads), slots // blocks["least"]))
    plan = _Plan(options, slots, queries, group, block, shares, new is None)
    own = ring.own_positions(lengths, queries, new)
    low = ring.lowest(options, lengths, starts, own, slots)
    where = jnp.stack([*ring.blocks(low, lengths, slots, block), lengths, low])
    rows = own_keys.rows_of(q)
    taken = rows.shape[2]
    padded = pl.next_power_of_2(max(taken, _LEAST))
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded - taken), (0, 0)))
    cached = pl.BlockSpec((None, None, keys.shape[2], width), lambda n, k, b: (b, k, 0, 0))
    out, log_sum = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(shares, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((4, None), lambda n, k, b: (0, b)),
            pl.BlockSpec((None, None, padded, width), lambda n, k, b: (b, k, 0, 0)),
            cached,
            cached,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, padded, width), lambda n, k, b: (n, b, k, 0, 0)),
            pl.BlockSpec((None, None, None, padded), lambda n, k, b: (n, b, k, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((shares, batch, kv_heads, padded, width), jnp.float32),
            jax.ShapeDtypeStruct((shares, batch, kv_heads, padded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=blocks["warps"], num_stages=blocks["stages"]
        ),
        name="decode_attention",
        interpret=interpret,
    )(where.astype(jnp.int32), rows, keys, values)
    return own_keys.joined(options, q, *_join(out[..., :taken, :], log_sum[..., :taken]), new)


def _join(out: jax.Array, log_sum: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins the shares `[N, ..]` of softmaxes."""
    if out.shape[0] == 1:
        return out[0], log_sum[0]
    maximum = flash.finite(jnp.max(log_sum, axis=0))
    weights = jnp.exp(log_sum - maximum)
    total = jnp.sum(weights, axis=0)
    out = jnp.sum(weights[..., None] * out, axis=0)
    # Minus infinity where no share saw anything.
    return out / jnp.where(total == 0.0, 1.0, total)[..., None], maximum + jnp.log(total)


class _Plan(NamedTuple):
    """The static part of a call.

    Attributes:
      slots, queries, group: S, T, G.
      block: slots of one step.
      shares: programs for one key head of one row.
      own_in_cache: whether the queries' own keys are in the cache.
    """

    options: Options
    slots: int
    queries: int
    group: int
    block: int
    shares: int
    own_in_cache: bool


def _kernel(
    plan: _Plan, where: Any, q: Any, keys: Any, values: Any, out: Any, log_sum: Any
) -> None:
    first, count, length, low = (where[i] for i in range(4))
    queries = q[...]
    blocks = -(-plan.slots // plan.block)
    share = lax.div(count + (plan.shares - 1), plan.shares)
    begin = pl.program_id(0) * share
    end = jnp.minimum(begin + share, count)

    def add(step: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, weighted = carry
        nominal = lax.rem(first + step, blocks) * plan.block
        # The last block is moved back to end with the ring; the slots before it are masked.
        start = jnp.minimum(nominal, max(plan.slots - plan.block, 0))
        at = pl.ds(start, plan.block)
        scores, _ = flash.scores(queries, keys[at, :], plan.options.scale, plan.options.softcap)
        seen = _seen(plan, start, nominal, length, low, queries.shape[0])
        scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1))
        base = flash.finite(new)
        shrink = jnp.exp2(maximum - base)
        weights = jnp.exp2(scores - base[:, None])
        total = shrink * total + jnp.sum(weights, axis=1)
        update = flash.contract(weights, values[at, :], (1, 0))
        return new, total, shrink[:, None] * weighted + update

    rows, width = queries.shape
    empty = (
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    maximum, total, weighted = lax.fori_loop(begin, end, add, empty)
    sums = jnp.where(total == 0.0, 1.0, total)
    out[...] = weighted / sums[:, None]
    log = (maximum + jnp.log2(sums)) / flash.LOG2_E
    log_sum[...] = jnp.where(total == 0.0, -jnp.inf, log)


def _seen(plan: _Plan, start: Any, nominal: Any, length: Any, low: Any, rows: int) -> jax.Array:
    """Returns which keys of a block count, `[M, block]`."""
    slot = start + jnp.arange(plan.block, dtype=jnp.int32)
    newest = jnp.maximum(length - 1, 0)
    turn = lax.rem(newest, plan.slots)  # slots up to here are of the ring's present turn
    position = slot + (newest - turn) - jnp.where(slot > turn, plan.slots, 0)
    seen = (slot >= nominal) & (slot < plan.slots) & (position >= low) & (position < length)
    seen = jnp.broadcast_to(seen[None, :], (rows, plan.block))
    if plan.queries == 1:
        return seen
    number = lax.div(jnp.arange(rows, dtype=jnp.int32), jnp.int32(plan.group))
    own = (number + (length - plan.queries if plan.own_in_cache else length))[:, None]
    if plan.own_in_cache:
        seen = seen & (position[None, :] <= own)
    if plan.options.window is not None:
        seen = seen & (position[None, :] > own - plan.options.window)
    return seen
