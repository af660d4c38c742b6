"""Flash attention for GPUs: the forward kernel and the two of the gradient, in Pallas (Triton).

A program holds one block of queries (of keys, for dk and dv) and loops over the blocks of the
other side that the window leaves. Blocks that the window leaves whole, most of them, run without a
mask. Query heads of a group read the same keys; nothing is repeated.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from common.kernels import flash, tuning
from common.kernels.attention import tile
from common.kernels.attention.cut import Cut, start
from common.kernels.attention.operands import Operands, padded
from common.kernels.attention.options import Options, both

warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

_Segments = tuple[jax.Array, jax.Array]
_LEAST = 16  # rows and columns of a tensor core's product


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
    plan = _plan("forward", options, q, k, offset)
    operands = padded(plan.cut, plan.width, q, k, v, mask, segments)
    shape = operands.q.shape
    row = jax.ShapeDtypeStruct((*shape[:3], 1, shape[3]), jnp.float32)
    out, log_sum = plan.run(
        _forward_kernel, operands, {"query": operands.q, "row": row}, interpret=interpret
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
    rows = (log_sum * flash.LOG2_E, delta, d_out)
    plan = _plan("backward_q", options, q, k, offset)
    operands = padded(plan.cut, plan.width, q, k, v, mask, segments, *rows)
    (dq,) = plan.run(_dq_kernel, operands, {"query": operands.q}, interpret=interpret)
    plan = _plan("backward_kv", options, q, k, offset)
    operands = padded(plan.cut, plan.width, q, k, v, mask, segments, *rows)
    dk, dv = plan.run(
        _dkv_kernel, operands, {"key": operands.k, "value": operands.v}, interpret=interpret
    )
    (queries, width), keys = q.shape[-2:], k.shape[-2]
    return dq[..., :queries, :width], dk[..., :keys, :width], dv[..., :keys, :width]


class _Plan(NamedTuple):
    """How the work is cut, and what a program gets of the multiprocessor."""

    cut: Cut
    width: int
    warps: int
    stages: int

    def run(
        self,
        kernel: Callable[..., None],
        operands: Operands,
        outputs: dict[str, Any],
        *,
        interpret: bool,
    ) -> list[jax.Array]:
        """Runs a kernel, one program for each block of its outputs.

        Args:
          kernel: takes the cut, `Operands` of references, and its outputs.
          outputs: by their kind of block ("query", "row", "key", "value"), arrays of their shapes.
        """
        cut = self.cut
        batch, kv_heads, group, rows, width = operands.q.shape
        columns = operands.k.shape[2]
        by_keys = "key" in outputs
        blocks = columns // cut.block_k if by_keys else rows // cut.block_q

        def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
            if by_keys:
                return pl.BlockSpec(shape, lambda n, k, b: index(b, k, 0, n))
            return pl.BlockSpec(
                shape, lambda n, h, b: index(b, lax.div(h, group), lax.rem(h, group), n)
            )

        if by_keys:  # A program sees all queries of the group's heads.
            query = spec((None, None, group, rows, width), lambda b, k, g, n: (b, k, 0, 0, 0))
            row = spec((None, None, group, None, rows), lambda b, k, g, n: (b, k, 0, 0, 0))
            key = spec((None, None, cut.block_k, width), lambda b, k, g, n: (b, k, n, 0))
            query_segments = spec((None, None, rows), lambda b, k, g, n: (b, 0, 0))
            key_segments = spec((None, None, cut.block_k), lambda b, k, g, n: (b, 0, n))
        else:
            query = spec((None, None, None, cut.block_q, width), lambda b, k, g, n: (b, k, g, n, 0))
            row = spec((None, None, None, None, cut.block_q), lambda b, k, g, n: (b, k, g, 0, n))
            key = spec((None, None, columns, width), lambda b, k, g, n: (b, k, 0, 0))
            query_segments = spec((None, None, cut.block_q), lambda b, k, g, n: (b, 0, n))
            key_segments = spec((None, None, columns), lambda b, k, g, n: (b, 0, 0))
        every = Operands(
            q=query,
            k=key,
            v=key,
            mask=None if operands.mask is None else spec(*self._mask(operands.mask.shape, by_keys)),
            query_segments=query_segments,
            key_segments=key_segments,
            log_sum=row,
            delta=row,
            d_out=query,
        )
        kinds = {"query": query, "row": row, "key": key, "value": key}

        def body(offset: Any, *refs: Any) -> None:
            known = isinstance(cut.offset, int)
            kernel(cut if known else cut._replace(offset=offset[0]), *refs)

        return pl.pallas_call(
            body,
            grid=(blocks, kv_heads if by_keys else kv_heads * group, batch),
            in_specs=[
                pl.BlockSpec((1,), lambda *_: (0,)),
                Operands(*(None if x is None else s for s, x in zip(every, operands))),
            ],
            out_specs=[kinds[kind] for kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
            compiler_params=plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages),
            name=f"attention{kernel.__name__.removesuffix('_kernel')}",
            interpret=interpret,
        )(jnp.asarray(cut.offset, jnp.int32)[None], operands)

    def _mask(self, shape: tuple[int, ...], by_keys: bool) -> tuple[tuple, Callable]:
        """Returns block and index map of a mask, whose axes of size 1 stand for all."""
        wide = [size > 1 for size in shape]
        group = shape[2] if by_keys else None
        rows, columns = shape[3:]
        if by_keys:
            columns = self.cut.block_k if wide[4] else 1
        else:
            rows = self.cut.block_q if wide[3] else 1

        def index(b: Any, k: Any, g: Any, n: Any) -> tuple:
            at = (b, k, 0, 0, n) if by_keys else (b, k, g, n, 0)
            return tuple(place if full else 0 for place, full in zip(at, wide))

        return (None, None, group, rows, columns), index


def _plan(
    kernel: str, options: Options, q: jax.Array, k: jax.Array, offset: jax.Array | None
) -> _Plan:
    queries, keys, width = q.shape[-2], k.shape[-2], q.shape[-1]
    shape = {"T": queries, "S": keys, "W": options.seen(keys), "h": width}
    blocks = tuning.blocks(Path(__file__).parent, kernel, k.dtype, shape, _default(kernel, q, k))
    block_q = min(blocks["queries"], max(_LEAST, pl.next_power_of_2(queries)))
    block_k = min(blocks["keys"], max(_LEAST, pl.next_power_of_2(keys)))
    cut = Cut(options, block_q, block_k, queries, keys, start(queries, keys, offset))
    wide = max(_LEAST, pl.next_power_of_2(width))
    return _Plan(cut, wide, blocks["warps"], blocks["stages"])


def _default(kernel: str, q: jax.Array, k: jax.Array) -> dict[str, int]:
    """Returns blocks that fit in shared memory and registers."""
    bytes_of_row = q.shape[-1] * k.dtype.itemsize
    small = 64 if bytes_of_row <= 256 else 32
    if kernel == "forward":
        large = 128 if bytes_of_row <= 512 else 64
        return {"queries": large, "keys": small, "warps": 4 if large * bytes_of_row <= 16384 else 8,
                "stages": 2}  # fmt: skip
    return {"queries": 64 if kernel == "backward_q" else small,
            "keys": small if kernel == "backward_q" else 64, "warps": 8, "stages": 2}  # fmt: skip


def _part(ref: Any, *places: Any) -> jax.Array:
    """Reads a part of a reference.

    Args:
      places: for each axis the index of a head, or a block's size and its number; an axis no
        larger than the block is read whole (it holds this block alone, or one value for all).
    """
    index = []
    for size, place in zip(ref.shape, places, strict=True):
        if not isinstance(place, tuple):
            index.append(place if size > 1 else 0)
        elif size > place[0]:
            index.append(pl.ds(place[1] * place[0], place[0]))
        else:
            index.append(slice(None))
    return ref[tuple(index)]


def _allowed(
    cut: Cut, operands: Operands, i: Any, j: Any, bounded: bool, *head: Any
) -> jax.Array | None:
    """Returns which pairs of tile `(i, j)` count, `[block_q, block_k]`; None for all."""
    allowed = None
    if bounded:
        key = j * cut.block_k + jnp.arange(cut.block_k, dtype=jnp.int32)[None, :]
        query = i * cut.block_q + jnp.arange(cut.block_q, dtype=jnp.int32)[:, None]
        ahead = key - (query + cut.offset)
        if cut.options.before is not None:
            allowed = ahead >= -cut.options.before
        if cut.options.after is not None:
            allowed = both(allowed, ahead <= cut.options.after)
        if cut.keys % cut.block_k:
            allowed = both(allowed, key < cut.keys)
    if operands.query_segments is not None:
        queries = _part(operands.query_segments, (cut.block_q, i))
        keys = _part(operands.key_segments, (cut.block_k, j))
        allowed = both(allowed, queries[:, None] == keys[None, :])
    if operands.mask is not None:
        mask = _part(operands.mask, *head, (cut.block_q, i), (cut.block_k, j))
        mask = jnp.broadcast_to(mask, (cut.block_q, cut.block_k))
        allowed = both(allowed, mask != 0)
    return allowed


def _loop(
    cut: Cut,
    operands: Operands,
    every: tuple[Any, Any],
    whole: tuple[Any, Any],
    body: Callable[..., Any],
    carry: Any,
) -> Any:
    """Runs `body(bounded, index, carry)` over blocks: `every` of them, `whole` without a mask."""
    (first, end), (low, high) = every, whole
    if not cut.bounded:
        return lax.fori_loop(first, end, functools.partial(body, False), carry)
    masked = functools.partial(body, True)
    if operands.mask is not None or operands.query_segments is not None:
        return lax.fori_loop(first, end, masked, carry)
    carry = lax.fori_loop(first, low, masked, carry)
    carry = lax.fori_loop(low, high, functools.partial(body, False), carry)
    return lax.fori_loop(high, end, masked, carry)


def _scores(
    options: Options, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    return flash.scores(left, right, options.scale, options.softcap)


def _forward_kernel(cut: Cut, operands: Operands, out: Any, log_sum: Any) -> None:
    i = pl.program_id(0)
    q = operands.q[...]

    def add(bounded: bool, j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, weighted = carry
        k, v = (_part(x, (cut.block_k, j), (x.shape[1], 0)) for x in (operands.k, operands.v))
        scores, _ = _scores(cut.options, q, k)
        scores = tile.masked(scores, _allowed(cut, operands, i, j, bounded))
        new = jnp.maximum(maximum, jnp.max(scores, axis=1))
        base = flash.finite(new)
        shrink = jnp.exp2(maximum - base)
        weights = jnp.exp2(scores - base[:, None])
        total = shrink * total + jnp.sum(weights, axis=1)
        return new, total, shrink[:, None] * weighted + flash.contract(weights, v, (1, 0))

    carry = (
        jnp.full(q.shape[:1], -jnp.inf, jnp.float32),
        jnp.zeros(q.shape[:1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    whole = cut.whole_keys_of(i)
    maximum, total, weighted = _loop(cut, operands, cut.keys_of(i), whole, add, carry)
    empty = total == 0.0
    sums = jnp.where(empty, 1.0, total)
    out[...] = (weighted / sums[:, None]).astype(out.dtype)
    log_sum[...] = jnp.where(empty, jnp.inf, (maximum + jnp.log2(sums)) / flash.LOG2_E)


def _dq_kernel(cut: Cut, operands: Operands, dq: Any) -> None:
    i = pl.program_id(0)
    q, d_out = operands.q[...], operands.d_out[...]
    log_sum, delta = operands.log_sum[...], operands.delta[...]

    def add(bounded: bool, j: Any, total: jax.Array) -> jax.Array:
        k, v = (_part(x, (cut.block_k, j), (x.shape[1], 0)) for x in (operands.k, operands.v))
        scores, tanh = _scores(cut.options, q, k)
        scores = tile.masked(scores, _allowed(cut, operands, i, j, bounded))
        weights = jnp.exp2(scores - log_sum[:, None])
        d_scores = weights * (flash.contract(d_out, v, (1, 1)) - delta[:, None])
        if tanh is not None:
            d_scores *= 1.0 - tanh * tanh
        return total + flash.contract(d_scores, k, (1, 0))

    whole = cut.whole_keys_of(i)
    empty = jnp.zeros(q.shape, jnp.float32)
    total = _loop(cut, operands, cut.keys_of(i), whole, add, empty)
    dq[...] = (cut.options.scale * total).astype(dq.dtype)


def _dkv_kernel(cut: Cut, operands: Operands, dk: Any, dv: Any) -> None:
    j = pl.program_id(0)
    k, v = operands.k[...], operands.v[...]
    group, _, width = operands.q.shape
    every, whole = cut.queries_of(j), cut.whole_queries_of(j)

    def head(g: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def add(bounded: bool, i: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dk, dv = totals
            rows = (cut.block_q, i)
            q, d_out = (_part(x, g, rows, (width, 0)) for x in (operands.q, operands.d_out))
            log_sum, delta = (_part(x, g, rows) for x in (operands.log_sum, operands.delta))
            q, d_out = q.astype(v.dtype), d_out.astype(v.dtype)
            # Transposed scores, so that the products below take them as they are.
            scores, tanh = _scores(cut.options, k, q)
            allowed = _allowed(cut, operands, i, j, bounded, g)
            scores = tile.masked(scores, None if allowed is None else allowed.T)
            weights = jnp.exp2(scores - log_sum[None, :])
            dv = dv + flash.contract(weights, d_out, (1, 0))
            d_scores = weights * (flash.contract(v, d_out, (1, 1)) - delta[None, :])
            if tanh is not None:
                d_scores *= 1.0 - tanh * tanh
            return dk + flash.contract(d_scores, q, (1, 0)), dv

        return _loop(cut, operands, every, whole, add, totals)

    empty = jnp.zeros(k.shape, jnp.float32)
    dk_total, dv_total = lax.fori_loop(0, group, head, (empty, empty))
    dk[...] = (cut.options.scale * dk_total).astype(dk.dtype)
    dv[...] = dv_total.astype(dv.dtype)
