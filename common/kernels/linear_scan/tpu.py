"""Linear recurrence on TPUs: every array passes once between HBM and the chip.

The grid is (batch, width blocks, time blocks), time innermost: the state waits in VMEM from one
time block to the next. Inside a block one time step follows the other. A step is a row `[1, W]`;
reading it strides over the `(8, 128)` tiles of the block, so that 1024 channels of one step fill
one vector register: nothing is transposed and no sublane is idle.

16-bit arrays hold two steps in each 32-bit word. Their tiles are widened into a scratch first.

Sizes that no block divides: the DMA of a block that hangs over an edge is cut there, channels never
meet, and steps past the end become `a = 1, x = 0`, which changes no state.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.kernels import tuning

_TILE = 32
# Steps of the neighbouring block that are read to get at one of them: a tile of 16-bit numbers.
_HALO = 16
_LANES = 128
# Channels in a block: more than one register of them keeps the arithmetic units busy.
_MAX_WIDTH = 1280
_MAX_TIME = 1024
# For all blocks of a kernel, two buffers each; a core has at least 16 MiB to give.
_VMEM_BYTES = 12 * 2**20

# What a kernel gets of an array: a block of steps, the few next to it, or one state.
_Part = str
STEPS, HALO, STATE = "steps", "halo", "state"


class Blocks(NamedTuple):
    """Sizes that do not change the result.

    Attributes:
      time, width: steps and channels in a block, multiples of `tile` and of 128.
      tile: steps in one iteration of the loop inside a block, a multiple of 16; more of them hide
        the latency of a load better.
    """

    time: int
    width: int
    tile: int


@functools.partial(jax.jit, static_argnames=("reverse", "interpret", "blocks"))
def forward(
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array,
    *,
    reverse: bool,
    interpret: bool,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns `h` `[B, L, D]` in the dtype of `x` and `h_last` `[B, D]` in float32."""
    grid = _cut("forward", (x, x, a), blocks, descending=reverse)
    inputs = [(STEPS, a), (STEPS, x), (STATE, h0)]
    outputs = [(STEPS, x.dtype), (STATE, jnp.float32)]
    h, h_last = _call(_forward_kernel, grid, inputs, outputs, interpret)
    return h, h_last


@functools.partial(jax.jit, static_argnames=("reverse", "interpret", "blocks"))
def backward(
    a: jax.Array,
    h: jax.Array,
    h0: jax.Array,
    dh: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
    interpret: bool,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(da, dx, dh0)` in the dtypes of `a`, `h` and `h0`."""
    grid = _cut("backward", (h, h, a, a, dh), blocks, descending=not reverse)
    inputs = [(STEPS, a), (STEPS, dh), (STEPS, h), (HALO, h), (STATE, h0), (STATE, dh_last)]
    outputs = [(STEPS, a.dtype), (STEPS, h.dtype), (STATE, jnp.float32)]
    da, dx, dh0 = _call(_backward_kernel, grid, inputs, outputs, interpret)
    return da, dx, dh0.astype(h0.dtype)


@functools.partial(jax.jit, static_argnames=("reverse", "decayed", "interpret", "blocks"))
def summary(
    a: jax.Array,
    x: jax.Array,
    *,
    reverse: bool,
    decayed: bool,
    interpret: bool,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the product of all decays and the last state from zero; see `xla.summary`."""
    grid = _cut("summary", (x, a), blocks, descending=reverse)
    inputs, outputs = [(STEPS, a), (STEPS, x)], [(STATE, jnp.float32)] * 2
    product, last = _call(_summary_kernel, grid, inputs, outputs, interpret, decayed=decayed)
    return product, last


# --- Kernels: one block each. What one leaves to the next stays in the outputs of part STATE. ---


def _forward_kernel(a_ref, x_ref, h0_ref, h_ref, last_ref, *scratch, grid):
    @pl.when(pl.program_id(2) == 0)
    def _():
        last_ref[...] = h0_ref[...]

    limit = grid.limit()

    def step(i, h):
        start = grid.start(i)
        a, x = (_Reader(*refs, start, limit) for refs in zip((a_ref, x_ref), scratch))
        out = _Writer(h_ref, scratch[2], start)
        for j in grid.order():
            h = a.row(j, 1.0) * h + x.row(j, 0.0)
            out.put(j, h)
        out.flush()
        return h

    last_ref[0] = lax.fori_loop(0, grid.tiles, step, last_ref[0])


def _backward_kernel(
    a_ref, dh_ref, h_ref, halo_ref, h0_ref, dlast_ref, da_ref, dx_ref, dh0_ref, *scratch, grid
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        dh0_ref[...] = dlast_ref[...]

    limit, h0 = grid.limit(), h0_ref[0]
    halo = halo_ref[0].astype(jnp.float32)
    halo = halo[_HALO - 1 :] if grid.descending else halo[:1]
    # The state before the block, in the order of the recurrence.
    entering = jnp.where(pl.program_id(2) == pl.num_programs(2) - 1, h0, halo)

    def step(i, c):
        start = grid.start(i)
        a, dh, h = (_Reader(*refs, start, limit) for refs in zip((a_ref, dh_ref, h_ref), scratch))
        da, dx = (_Writer(*refs, start) for refs in zip((da_ref, dx_ref), scratch[3:]))
        for j in grid.order():
            before = j - 1 if grid.descending else j + 1
            if 0 <= before < grid.tile:
                state = h.row(before, h0)
            else:  # In the next tile of the block; behind the last one the block ends.
                state = jnp.where(i == grid.tiles - 1, entering, h.outside(before, h0))
            g = dh.row(j, 0.0) + c
            da.put(j, g * state)
            dx.put(j, g)
            c = a.row(j, 1.0) * g
        da.flush()
        dx.flush()
        return c

    dh0_ref[0] = lax.fori_loop(0, grid.tiles, step, dh0_ref[0])


def _summary_kernel(a_ref, x_ref, product_ref, last_ref, *scratch, grid, decayed):
    @pl.when(pl.program_id(2) == 0)
    def _():
        product_ref[...] = jnp.ones_like(product_ref)
        last_ref[...] = jnp.zeros_like(last_ref)

    limit = grid.limit()

    def step(i, carry):
        product, h = carry
        start = grid.start(i)
        a, x = (_Reader(*refs, start, limit) for refs in zip((a_ref, x_ref), scratch))
        for j in grid.order():
            a_j, x_j = a.row(j, 1.0), x.row(j, 0.0)
            product, h = a_j * product, a_j * (h + x_j) if decayed else a_j * h + x_j
        return product, h

    carry = (product_ref[0], last_ref[0])
    product_ref[0], last_ref[0] = lax.fori_loop(0, grid.tiles, step, carry)


# --- Rows of a block. ---


class _Reader:
    """The steps of one tile of a block, as float32 rows `[1, W]`.

    Args:
      ref: the block, `[1, T, W]`.
      scratch: `[tile, W]` float32, for the tile of a 16-bit block.
      start: the tile's first step in the block.
      limit: the number of steps in the block, where some are past the end of the sequence.
    """

    def __init__(self, ref, scratch, start, limit):
        self.ref, self.scratch, self.start, self.limit = ref, scratch, start, limit
        if ref.dtype != jnp.float32:
            scratch[...] = ref[0, pl.ds(start, scratch.shape[0]), :].astype(jnp.float32)

    def row(self, j, fill):
        """Step `j` of the tile; `fill` past the end of the sequence."""
        if self.ref.dtype == jnp.float32:
            return self._within(j, self.ref[0, pl.ds(self.start + j, 1), :], fill)
        return self._within(j, self.scratch[j : j + 1, :], fill)

    def outside(self, j, fill):
        """Step `j` just before or after the tile; any row where the block ends there."""
        steps, tile = self.ref.shape[1], self.scratch.shape[0]
        rows = 1 if self.ref.dtype == jnp.float32 else _HALO
        first = jnp.maximum(self.start - rows, 0)
        if j > 0:
            first = jnp.minimum(self.start + tile, steps - rows)
        near = self.ref[0, pl.ds(pl.multiple_of(first, rows), rows), :].astype(jnp.float32)
        return self._within(j, near[:1] if j > 0 else near[rows - 1 :], fill)

    def _within(self, j, row, fill):
        return row if self.limit is None else jnp.where(self.start + j < self.limit, row, fill)


class _Writer:
    """Takes the rows of one tile; see `_Reader`."""

    def __init__(self, ref, scratch, start):
        self.ref, self.scratch, self.start = ref, scratch, start

    def put(self, j, row):
        if self.ref.dtype == jnp.float32:
            self.ref[0, pl.ds(self.start + j, 1), :] = row
        else:
            self.scratch[j : j + 1, :] = row

    def flush(self):
        if self.ref.dtype != jnp.float32:
            tile = self.scratch.shape[0]
            self.ref[0, pl.ds(self.start, tile), :] = self.scratch[...].astype(self.ref.dtype)


# --- Blocks. ---


class _Grid(NamedTuple):
    """How `[B, L, D]` is cut.

    Attributes:
      shape: `(B, L, D)`.
      time, width: steps and channels in a block.
      tile: steps in one iteration; divides `time`.
      descending: whether time runs from the last step to the first.
    """

    shape: tuple[int, int, int]
    time: int
    width: int
    tile: int
    descending: bool

    @property
    def counts(self) -> tuple[int, int, int]:
        batch, length, width = self.shape
        return batch, pl.cdiv(width, self.width), pl.cdiv(length, self.time)

    @property
    def tiles(self) -> int:
        return self.time // self.tile

    def order(self) -> Sequence[int]:
        """The steps of a tile in running order."""
        return range(self.tile)[::-1] if self.descending else range(self.tile)

    def start(self, i):
        """The first step of the tile that comes `i`-th."""
        i = self.tiles - 1 - i if self.descending else i
        return pl.multiple_of(i * self.tile, self.tile)

    def limit(self):
        """The number of this block's steps before the end; None where all blocks are full."""
        length = self.shape[1]
        if length % self.time == 0:
            return None
        return length - self._along(pl.program_id(2)) * self.time

    def spec(self, part: _Part) -> pl.BlockSpec:
        if part == STATE:
            return pl.BlockSpec((1, 1, self.width), lambda b, d, t: (b, 0, d))
        if part == STEPS:
            return pl.BlockSpec((1, self.time, self.width), lambda b, d, t: (b, self._along(t), d))
        return pl.BlockSpec((1, _HALO, self.width), lambda b, d, t: (b, self._beside(t), d))

    def _along(self, t):
        return self.counts[2] - 1 - t if self.descending else t

    def _beside(self, t):
        """The index, in units of `_HALO` steps, of the halo of the block that comes `t`-th."""
        per_block = self.time // _HALO
        if self.descending:
            return jnp.maximum(self._along(t) * per_block - 1, 0)
        return jnp.minimum((t + 1) * per_block, pl.cdiv(self.shape[1], _HALO) - 1)


def _cut(
    kernel: str, arrays: Sequence[jax.Array], blocks: Blocks | None, *, descending: bool
) -> _Grid:
    """Returns the grid of a kernel that reads and writes arrays like `arrays`, `[B, L, D]`."""
    shape = arrays[0].shape
    time, width, tile = blocks or _tuned(kernel, arrays)
    tile = _HALO * pl.cdiv(min(tile, shape[1]), _HALO)
    # As many blocks as that takes, and no longer than that many need to be.
    time = tile * pl.cdiv(shape[1], tile * pl.cdiv(shape[1], time))
    return _Grid(shape, time, width, tile, descending)


def _tuned(kernel: str, arrays: Sequence[jax.Array]) -> Blocks:
    _, length, width = arrays[0].shape
    block = _LANES * pl.cdiv(width, _LANES * pl.cdiv(width, _MAX_WIDTH))
    fitting = _VMEM_BYTES // (2 * block * sum(array.dtype.itemsize for array in arrays))
    time = min(_MAX_TIME, 2 ** int(math.log2(fitting)))
    default = {"time": time, "width": block, "tile": _TILE}
    shape = {"L": length, "D": width}
    return Blocks(**tuning.blocks(Path(__file__).parent, kernel, arrays[0].dtype, shape, default))


def _call(
    kernel: Callable[..., None],
    grid: _Grid,
    inputs: Sequence[tuple[_Part, jax.Array]],
    outputs: Sequence[tuple[_Part, Any]],
    interpret: bool,
    **options: Any,
) -> Sequence[jax.Array]:
    """Runs `kernel` over all blocks.

    Args:
      kernel: of the references to inputs, outputs, and a scratch for each of them that is STEPS.
      grid: how the arrays are cut.
      inputs: arrays `[B, L, D]`, or `[B, D]` for STATE.
      outputs: dtypes; the shapes follow from the part.
    """
    batch, _, width = grid.shape
    operands = [
        array[:, None].astype(jnp.float32) if part == STATE else array for part, array in inputs
    ]
    varying = jax.typeof(operands[0]).manual_axis_type
    shapes = {STEPS: grid.shape, STATE: (batch, 1, width)}
    out_shape = [
        jax.ShapeDtypeStruct(shapes[part], dtype, manual_axis_type=varying)
        for part, dtype in outputs
    ]
    parts = [part for part, _ in (*inputs, *outputs)]
    results = pl.pallas_call(
        functools.partial(kernel, grid=grid, **options),
        grid=grid.counts,
        in_specs=[grid.spec(part) for part, _ in inputs],
        out_specs=[grid.spec(part) for part, _ in outputs],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((grid.tile, grid.width), jnp.float32)] * parts.count(STEPS),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * math.prod(grid.shape),
            transcendentals=0,
            bytes_accessed=sum(
                array.size * array.dtype.itemsize for array in (*operands, *out_shape)
            ),
        ),
        interpret=interpret,
        name=f"linear_scan_{kernel.__name__.strip('_')}",
    )(*operands)
    return [
        result[:, 0] if part == STATE else result for (part, _), result in zip(outputs, results)
    ]
