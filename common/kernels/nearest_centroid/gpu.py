"""Nearest centroid on a GPU (Pallas, Triton): scores live in registers, one tile at a time.

A program takes a block of rows past all centroids, or past one part of them where the rows alone
are too few to fill the GPU; the parts are then compared outside. Data up to one block of dimensions
wide is read once and kept, wider data comes again for every block of centroids, from the caches.

Triton, not Mosaic GPU, in all GPU kernels here: its interpreter and its machine code ahead of time
work alike on every supported JAX, where Mosaic GPU's interface differs between them and needs a
Hopper. Newer JAX calls it deprecated; this file is all that would have to be replaced.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from common.kernels import tuning

warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

_BLOCKS = {"rows": 128, "centroids": 256, "depth": 64, "warps": 8, "stages": 3}
_FLOAT32_BLOCKS = {"rows": 128, "centroids": 128, "depth": 32, "warps": 8, "stages": 3}
# What a tensor core's product needs at the least.
_LEAST = 16
# Programs that keep a large GPU busy.
_PROGRAMS = 264


def search(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See `xla.search`."""
    shape = {"N": x.shape[0], "K": c.shape[0], "D": x.shape[1]}
    default = _BLOCKS if x.dtype.itemsize == 2 else _FLOAT32_BLOCKS
    blocks = tuning.blocks(Path(__file__).parent, "forward", x.dtype, shape, default)
    index, score = _search(x, c, half, tuple(blocks[name] for name in _BLOCKS), interpret)
    return index, score


def search_two(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `xla.search_two`."""
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
    blocks: tuple[int, int, int, int, int],
    interpret: bool,
    two: bool = False,
) -> tuple[jax.Array, ...]:
    total, width = x.shape
    rows, centroids, depth = (
        max(_LEAST, min(most, pl.next_power_of_2(size)))
        for most, size in zip(blocks, (total, c.shape[0], width))
    )
    row_blocks, centroid_blocks = pl.cdiv(total, rows), pl.cdiv(c.shape[0], centroids)
    parts = min(centroid_blocks, pl.cdiv(_PROGRAMS, row_blocks))
    of_part = pl.cdiv(centroid_blocks, parts)  # blocks of centroids
    parts = pl.cdiv(centroid_blocks, of_part)
    index, score, *following = pl.pallas_call(
        functools.partial(
            _kernel,
            rows=rows,
            centroids=centroids,
            depth=depth,
            of_part=of_part,
            interpret=interpret,
            two=two,
        ),
        out_shape=tuple(
            jax.ShapeDtypeStruct((parts, total), dtype)
            for dtype in (jnp.int32, *[jnp.float32] * (1 + two))
        ),
        grid=(row_blocks, parts),
        compiler_params=plgpu.CompilerParams(num_warps=blocks[3], num_stages=blocks[4]),
        interpret=interpret,
        name="nearest_centroid",
    )(x, c, half)
    if parts == 1:
        return index[0], score[0], *(after[0] for after in following)
    # The first of equal parts holds the lower indices.
    best = jnp.argmin(score, axis=0, keepdims=True)
    others = jnp.arange(parts)[:, None] != best
    return (
        jnp.take_along_axis(index, best, axis=0)[0],
        jnp.take_along_axis(score, best, axis=0)[0],
        *(jnp.min(jnp.where(others, score, after), axis=0) for after in following),
    )


def _kernel(
    x_ref: Any,
    c_ref: Any,
    half_ref: Any,
    *refs: Any,
    rows: int,
    centroids: int,
    depth: int,
    of_part: int,
    interpret: bool,
    two: bool,
) -> None:
    """One block of rows against one part of the centroids.

    Args:
      x_ref, c_ref, half_ref: `[N, D]`, `[K, D]`, `[K]`.
      refs: results, `[parts, N]`: index, score and, with `two`, the following one.
      rows, centroids, depth: sizes of a block.
      of_part: blocks of centroids in a part.
      interpret: whether this runs in the interpreter.
      two: whether the next higher score is wanted.
    """
    (total, width), count = x_ref.shape, c_ref.shape[0]
    part = pl.program_id(1)
    here = pl.ds(pl.program_id(0) * rows, rows)
    in_rows = _within(here, rows, total)
    # Newer JAX refuses a block known beforehand to reach beyond the array, mask or not.
    zero = 0 * part
    kept = _load(x_ref, here, zero, in_rows, depth) if width <= depth else None

    def step(k: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        index, best, *following = found
        there = pl.ds((part * of_part + k) * centroids, centroids)
        in_centroids = _within(there, centroids, count)

        def product(d: jax.Array, total: jax.Array) -> jax.Array:
            rows = _load(x_ref, here, d, in_rows, depth) if kept is None else kept
            return total + _product(
                rows, _load(c_ref, there, d, in_centroids, depth), interpret=interpret
            )

        products = jnp.zeros((rows, centroids), jnp.float32)
        if kept is None:
            products = lax.fori_loop(0, pl.cdiv(width, depth), product, products)
        else:
            products = product(zero, products)
        half = plgpu.load(half_ref.at[there], mask=in_centroids, other=jnp.inf)
        scores = half[None] - products
        scores = jnp.where(scores < jnp.inf, scores, jnp.inf)  # no NaN
        low = jnp.min(scores, axis=1)
        places = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        at = jnp.min(jnp.where(scores == low[:, None], places, centroids), axis=1)
        if two:
            behind = jnp.min(jnp.where(places == at[:, None], jnp.inf, scores), axis=1)
            behind = jnp.minimum(behind, jnp.maximum(low, best))
            following = [jnp.minimum(after, behind) for after in following]
        less = low < best
        return jnp.where(less, there.start + at, index), jnp.where(less, low, best), *following

    worst = jnp.full((rows,), jnp.inf, jnp.float32)
    none = (jnp.zeros((rows,), jnp.int32), *[worst] * (1 + two))
    found = lax.fori_loop(0, of_part, step, none)
    for ref, of_rows in zip(refs, found, strict=True):
        plgpu.store(ref.at[part, here], of_rows, mask=in_rows)


def _within(block: Any, size: int, total: int) -> jax.Array:
    return block.start + lax.broadcasted_iota(jnp.int32, (size,), 0) < total


def _load(ref: Any, rows: Any, d: jax.Array, in_rows: jax.Array, depth: int) -> jax.Array:
    """Returns block `d` of the dimensions of some rows, zero outside the array."""
    columns = pl.ds(d * depth, depth)
    mask = in_rows[:, None]
    if ref.shape[1] % depth:
        mask &= _within(columns, depth, ref.shape[1])[None]
    return plgpu.load(ref.at[rows, columns], mask=mask, other=0)


def _product(x: jax.Array, c: jax.Array, *, interpret: bool) -> jax.Array:
    """Returns `x c^T` in float32.

    Float32 operands are split into three TF32 products each, which a tensor core finishes in half
    the time of as accurate a product outside of it.
    """
    algorithm: Any = None
    if x.dtype == jnp.float32:
        three = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        algorithm = lax.Precision.HIGHEST if interpret else three
    return lax.dot_general(
        x, c, (((1,), (1,)), ((), ())), precision=algorithm, preferred_element_type=jnp.float32
    )
