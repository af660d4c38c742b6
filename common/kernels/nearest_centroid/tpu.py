"""Nearest centroid on a TPU (Pallas, Mosaic): scores live in VMEM, one tile at a time.

The grid walks blocks of rows, of centroids and, for wide data, of dimensions, the last fastest. A
row block stays in VMEM while all centroids stream past it, so that a wide block of rows decides how
many operations every byte of a centroid serves. The running minimum is kept apart for each of the
128 lanes, which costs one comparison and two selections a score; lanes are compared with each other
once, after the last centroid.
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.kernels import tuning

_LANES = 128
# Two blocks of each operand and one of scores fit in 16 MiB.
_BLOCKS = {"rows": 1024, "centroids": 1024, "depth": 1024, "part": 256}
# The six products that make one of float32 take longer, so that smaller steps will do.
_FLOAT32_BLOCKS = {"rows": 1024, "centroids": 512, "depth": 512, "part": 256}
_VMEM = 48 * 2**20


def search(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See `xla.search`.

    Blocks are sizes of rows, centroids and dimensions, and the rows whose product is one piece of
    straight code: the matrix unit works on one while the vector unit compares the one before.
    """
    shape = {"N": x.shape[0], "K": c.shape[0], "D": x.shape[1]}
    default = _BLOCKS if x.dtype.itemsize == 2 else _FLOAT32_BLOCKS
    blocks = tuning.blocks(Path(__file__).parent, "forward", x.dtype, shape, default)
    index, score = _search(x, c, half, tuple(blocks[name] for name in _BLOCKS), interpret)
    return index, score


def search_two(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `xla.search_two`; one comparison and two selections a score more."""
    shape = {"N": x.shape[0], "K": c.shape[0], "D": x.shape[1]}
    default = _BLOCKS if x.dtype.itemsize == 2 else _FLOAT32_BLOCKS
    blocks = tuning.blocks(Path(__file__).parent, "forward", x.dtype, shape, default)
    sizes = tuple(blocks[name] for name in _BLOCKS)
    index, score, following = _search(x, c, half, sizes, interpret, True)
    return index, score, following


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _search(
    x: jax.Array,
    c: jax.Array,
    half: jax.Array,
    blocks: tuple[int, int, int, int],
    interpret: bool,
    two: bool = False,
) -> tuple[jax.Array, ...]:
    total, width = x.shape
    most_rows, most_centroids, most_depth, part = blocks
    rows = min(most_rows, _round_up(total, _LANES))
    centroids = min(most_centroids, _round_up(c.shape[0], _LANES))
    # The last block computes as much as the others: blocks even in size waste least.
    depths = pl.cdiv(width, most_depth)
    depth = _round_up(pl.cdiv(width, depths), _LANES) if depths > 1 else width
    grid = (pl.cdiv(total, rows), pl.cdiv(c.shape[0], centroids), pl.cdiv(width, depth))
    # What lies behind the last centroid is never less than anything.
    half = jnp.pad(half, (0, grid[1] * centroids - c.shape[0]), constant_values=jnp.inf)
    row_vector = pl.BlockSpec((1, rows), lambda n, k, d: (0, n))
    per_lane = (rows, _LANES)
    scores = [jnp.float32] * (1 + two)
    scratch = [pltpu.VMEM(per_lane, dtype) for dtype in (jnp.int32, *scores)]
    if grid[2] > 1:
        scratch.append(pltpu.VMEM((rows, centroids), jnp.float32))
    found = pl.pallas_call(
        functools.partial(_kernel, width=width, part=math.gcd(part, rows), two=two),
        out_shape=tuple(jax.ShapeDtypeStruct((1, total), dtype) for dtype in (jnp.int32, *scores)),
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, depth), lambda n, k, d: (n, d)),
            pl.BlockSpec((centroids, depth), lambda n, k, d: (k, d)),
            pl.BlockSpec((1, centroids), lambda n, k, d: (0, k)),
        ],
        out_specs=(row_vector,) * (2 + two),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * total * c.shape[0] * width,
            bytes_accessed=(x.size + grid[0] * c.size) * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="nearest_centroid",
    )(x, c, half[None])
    return tuple(of_rows[0] for of_rows in found)


def _kernel(
    x_ref: Any,
    c_ref: Any,
    half_ref: Any,
    *refs: Any,
    width: int,
    part: int,
    two: bool,
) -> None:
    """One block of rows against one block of centroids, over one block of dimensions.

    Args:
      x_ref, c_ref: `[rows, depth]`, `[centroids, depth]`.
      half_ref: `[1, centroids]`.
      refs: results, `[1, rows]`: index, score and, with `two`, the following one; of each lane so
        far, `[rows, 128]`, which 128 centroids its least score is from, that score and, with `two`,
        the following one; products `[rows, centroids]`, where dimensions come in several blocks.
      width: of a whole row.
      part: rows multiplied at a time.
      two: whether the next higher score is wanted.
    """
    results = 2 + two
    index_ref, score_ref, *following_ref = refs[:results]
    slot_ref, best_ref, *next_ref = refs[results : 2 * results]
    lane_refs = refs[results : 2 * results]
    products_ref = refs[2 * results] if len(refs) > 2 * results else None
    k, d = pl.program_id(1), pl.program_id(2)

    @pl.when((k == 0) & (d == 0))
    def _start() -> None:
        slot_ref[...] = jnp.zeros_like(slot_ref)
        for ref in (best_ref, *next_ref):
            ref[...] = jnp.full_like(ref, jnp.inf)

    if products_ref is None:
        for first in range(0, x_ref.shape[0], part):
            rows = pl.ds(first, part)
            _compare(_product(x_ref[rows], c_ref[...]), half_ref, lane_refs, rows, k)
    else:
        rest = width - d * x_ref.shape[1] if width % x_ref.shape[1] else None
        for first in range(0, x_ref.shape[0], part):
            rows = pl.ds(first, part)
            product = _product(_cut(x_ref[rows], rest), _cut(c_ref[...], rest))
            products_ref[rows] = jnp.where(d == 0, 0.0, products_ref[rows]) + product

        @pl.when(d == pl.num_programs(2) - 1)
        def _compare_all() -> None:
            for first in range(0, x_ref.shape[0], part):
                rows = pl.ds(first, part)
                _compare(products_ref[rows], half_ref, lane_refs, rows, k)

    @pl.when((k == pl.num_programs(1) - 1) & (d == pl.num_programs(2) - 1))
    def _finish() -> None:
        best, slot = best_ref[...].T, slot_ref[...].T  # [128, rows]
        index = slot * _LANES + lax.broadcasted_iota(jnp.int32, slot.shape, 0)
        low = jnp.min(best, axis=0, keepdims=True)
        # No score is less than infinity where nothing was found; every slot is then zero.
        index_ref[...] = jnp.min(
            jnp.where(best == low, index, jnp.iinfo(jnp.int32).max), axis=0, keepdims=True
        )
        score_ref[...] = low
        if two:  # Of the winner's lane the one behind it, of all others their least.
            following = jnp.where(index == index_ref[...], next_ref[0][...].T, best)
            following_ref[0][...] = jnp.min(following, axis=0, keepdims=True)


def _compare(
    products: jax.Array, half_ref: Any, lane_refs: tuple[Any, ...], rows: Any, k: jax.Array
) -> None:
    """Lets `[part, centroids]` products of one block of centroids into the running minimum."""
    slot, best, *following = (ref[rows] for ref in lane_refs)
    slots = products.shape[1] // _LANES
    for j in range(slots):
        lanes = slice(j * _LANES, (j + 1) * _LANES)
        scores = half_ref[:, lanes] - products[:, lanes]
        less = scores < best  # False for a NaN
        slot = jnp.where(less, k * slots + j, slot)
        following = [
            jnp.where(less, best, jnp.where(scores < after, scores, after)) for after in following
        ]
        best = jnp.where(less, scores, best)
    for ref, of_lanes in zip(lane_refs, (slot, best, *following), strict=True):
        ref[rows] = of_lanes


def _product(x: jax.Array, c: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, c, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _cut(block: jax.Array, rest: jax.Array | None) -> jax.Array:
    """Zeroes the dimensions from `rest` on, where the last block reaches beyond the array."""
    if rest is None:
        return block
    lanes = lax.broadcasted_iota(jnp.int32, block.shape, 1)
    return jnp.where(lanes < rest, block, jnp.zeros_like(block))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
