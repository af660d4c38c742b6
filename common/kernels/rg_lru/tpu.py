"""RG-LRU for TPU (Mosaic): gates and recurrence in one pass over memory each way.

The grid is (batch, channels, time); time runs innermost and in order, and the state stays in VMEM
between its blocks. A block is cut into eight stretches of time, which stand in the eight sublanes
of a register. The recurrence runs through all of them side by side, twice: first from no state,
together with the product of decays, to find what each stretch does to any state; then from the
states that follow.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

try:
    from jax.experimental.pallas.tpu import reciprocal
except ImportError:  # before jax 0.11
    from jax.experimental.pallas import reciprocal

from common.kernels import tuning
from common.kernels.rg_lru import gates

_LANES, _STRETCHES = 128, 8
_ROWS = 16  # steps that elementwise work takes at a time: one register of 16-bit numbers
_UNIT = _STRETCHES * _ROWS  # a block of time is a multiple of this
_UNROLL = 4  # iterations that the compiler interleaves

_FORWARD, _BACKWARD = {"time": 512, "channels": 512}, {"time": 256, "channels": 512}


def forward(
    v: jax.Array,
    gate_x: jax.Array,
    gate_a: jax.Array,
    a_param: jax.Array,
    h0: jax.Array,
    reset: jax.Array,
    valid: jax.Array | None,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns `h` `[B, L, E]` in the dtype of `v` and `h_last` `[B, E]` in float32."""
    time, channels = _blocks("forward", v, _FORWARD)
    operands = v, gate_x, gate_a, a_param, h0, reset, valid
    return _forward(*operands, time=time, channels=channels, interpret=interpret)


def backward(
    v: jax.Array,
    gate_x: jax.Array,
    gate_a: jax.Array,
    a_param: jax.Array,
    h0: jax.Array,
    reset: jax.Array,
    valid: jax.Array | None,
    h: jax.Array,
    dh: jax.Array,
    dh_last: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `v, gate_x, gate_a, a_param, h0`, each in its dtype."""
    time, channels = _blocks("backward", v, _BACKWARD)
    operands = v, gate_x, gate_a, a_param, h0, reset, valid, h, dh, dh_last
    return _backward(*operands, time=time, channels=channels, interpret=interpret)


def _blocks(kernel: str, v: jax.Array, default: dict[str, int]) -> tuple[int, int]:
    """Returns a block's steps and channels: no larger than the (padded) array, little left over."""
    length, width = (max(size, unit) for size, unit in zip(v.shape[1:], (_UNIT, _LANES)))
    shape = {"L": length, "E": width}
    found = tuning.blocks(Path(__file__).parent, f"tpu_{kernel}", v.dtype, shape, default)
    return _even(length, found["time"], _UNIT), _even(width, found["channels"], _LANES)


def _even(size: int, most: int, unit: int) -> int:
    """Returns the size of the fewest blocks of at most `most`: a multiple of `unit` within size."""
    even = pl.cdiv(size, pl.cdiv(size, most))
    return min(pl.cdiv(even, unit), size // unit) * unit


def _padded(array: jax.Array, axes: dict[int, int]) -> jax.Array:
    """Pads some axes with zeros up to the least sizes given."""
    pads = [(0, max(0, axes.get(i, 0) - size)) for i, size in enumerate(array.shape)]
    return jnp.pad(array, pads) if any(pad for _, pad in pads) else array


@functools.partial(jax.jit, static_argnames=("time", "channels", "interpret"))
def _forward(v, gate_x, gate_a, a_param, h0, reset, valid, *, time, channels, interpret):
    batch, length, width = v.shape
    wide = [_padded(x, {1: time, 2: channels}) for x in (v, gate_x, gate_a)]
    grid = _grid(wide[0].shape, time, channels)
    at = _BlockSpecs(time, channels, grid[2], reverse=False)
    h, h_last = pl.pallas_call(
        _forward_kernel,
        grid=grid,
        in_specs=[at.forced, at.rate, at.state, at.wide, at.wide, at.wide],
        out_specs=[at.wide, at.state],
        out_shape=[
            jax.ShapeDtypeStruct(wide[0].shape, v.dtype),
            jax.ShapeDtypeStruct((batch, 1, wide[0].shape[2]), jnp.float32),
        ],
        scratch_shapes=_scratch(time, channels),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="rg_lru_forward",
    )(
        _forced(reset, valid, (batch, length), time),
        _padded(gates.rates(a_param)[None], {1: channels}),
        _padded(h0.astype(jnp.float32)[:, None], {2: channels}),
        *wide,
    )
    return h[:, :length, :width], h_last[:, 0, :width]


@functools.partial(jax.jit, static_argnames=("time", "channels", "interpret"))
def _backward(
    v, gate_x, gate_a, a_param, h0, reset, valid, h, dh, dh_last, *, time, channels, interpret
):
    batch, length, width = v.shape
    wide = [_padded(x, {1: time, 2: channels}) for x in (v, gate_x, gate_a, dh, h)]
    grid = _grid(wide[0].shape, time, channels)
    at = _BlockSpecs(time, channels, grid[2], reverse=True)
    states = [_padded(x.astype(jnp.float32)[:, None], {2: channels}) for x in (h0, dh_last)]
    flat = jax.ShapeDtypeStruct((batch, 1, wide[0].shape[2]), jnp.float32)
    *wide_gradients, d_rate, dh0 = pl.pallas_call(
        functools.partial(_backward_kernel, length=wide[0].shape[1]),
        grid=grid,
        in_specs=[
            *(at.forced, at.rate, at.state, at.state),
            *(at.wide, at.wide, at.wide, at.wide, at.wide, at.before),
        ],
        out_specs=[at.wide, at.wide, at.wide, at.state, at.state],
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wide[:3]), flat, flat],
        scratch_shapes=_scratch(time, channels),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="rg_lru_backward",
    )(
        _forced(reset, valid, (batch, length), time),
        _padded(gates.rates(a_param)[None], {1: channels}),
        *states,
        *wide,
        wide[-1],
    )
    dv, d_gate_x, d_gate_a = (x[:, :length, :width] for x in wide_gradients)
    d_a_param = gates.d_a_param(a_param, d_rate[:, 0, :width])
    return dv, d_gate_x, d_gate_a, d_a_param, dh0[:, 0, :width].astype(h0.dtype)


_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _grid(shape: tuple[int, ...], time: int, channels: int) -> tuple[int, int, int]:
    return shape[0], pl.cdiv(shape[2], channels), pl.cdiv(shape[1], time)


def _forced(
    reset: jax.Array, valid: jax.Array | None, shape: tuple[int, int], time: int
) -> jax.Array:
    """Returns `gates.forced_log_decay` as `[B, 1, L]`, filled up to whole blocks."""
    length = pl.cdiv(shape[1], time) * time
    return gates.forced_log_decay(reset, valid, shape, length)[:, None]


class _BlockSpecs:
    """Which block of each operand a grid step sees; with `reverse`, the last in time first."""

    def __init__(self, time: int, channels: int, count: int, *, reverse: bool):
        def block(t: Any) -> Any:
            return count - 1 - t if reverse else t

        rows = time // _ROWS
        self.wide = pl.BlockSpec((1, time, channels), lambda b, e, t: (b, block(t), e))
        self.before = pl.BlockSpec(  # the rows that end where the block begins
            (1, _ROWS, channels), lambda b, e, t: (b, jnp.maximum(block(t) * rows - 1, 0), e)
        )
        self.forced = pl.BlockSpec((1, 1, time), lambda b, e, t: (b, 0, block(t)))
        self.rate = pl.BlockSpec((1, channels), lambda b, e, t: (0, e))
        self.state = pl.BlockSpec((1, 1, channels), lambda b, e, t: (b, 0, e))


def _scratch(time: int, channels: int) -> list[Any]:
    """For forced decays as a column, for two values a step and channel, for stretches' starts."""
    groups = channels // _LANES
    # Strided access to sublanes asks for arrays of one register's width, and stays clear of bank
    # conflicts if its stride is odd: one row is left free after each stretch.
    wide = pltpu.VMEM((groups, time + _STRETCHES, _LANES), jnp.float32)
    column = pltpu.VMEM((time, _LANES), jnp.float32)
    starts = pltpu.VMEM((groups, _STRETCHES, _LANES), jnp.float32)
    return [column, wide, wide, starts]


# --- Inside the kernels: references to blocks `[1, T, C]`, `[1, 1, C]`, and scratch.

_Gates = functools.partial(gates.Gates, reciprocal=functools.partial(reciprocal, full_range=False))


def _forward_kernel(
    forced_ref, rate_ref, h0_ref, v_ref, gate_x_ref, gate_a_ref, h_ref, last_ref,
    column_ref, a_ref, x_ref, starts_ref,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        last_ref[...] = h0_ref[...]

    def gate(rows, own):
        for group, lanes in _groups(a_ref):
            gate = _Gates(rate_ref[:, lanes], column_ref[rows, :])
            v, gate_x, gate_a = _read(rows, lanes, v_ref, gate_x_ref, gate_a_ref)
            a_ref[group, own, :], x_ref[group, own, :] = gate.decay_and_input(v, gate_x, gate_a)

    def step(a, h, x_ref):
        h = a * h + x_ref[...]
        return h, h

    def finish(rows, own):
        for group, lanes in _groups(x_ref):
            h_ref[0, rows, lanes] = x_ref[group, own, :].astype(h_ref.dtype)

    _spread(forced_ref, column_ref)
    _each_rows(gate, column_ref)
    _recur(step, a_ref, x_ref, last_ref, starts_ref, reverse=False)
    _each_rows(finish, column_ref)


def _backward_kernel(
    forced_ref, rate_ref, h0_ref, dh_last_ref,
    v_ref, gate_x_ref, gate_a_ref, dh_ref, h_ref, before_ref,
    dv_ref, d_gate_x_ref, d_gate_a_ref, d_rate_ref, carry_ref,
    column_ref, a_ref, g_ref, starts_ref,
    *, length,
):  # fmt: skip
    """With `g_t` the gradient of `h_t`: `g_t = dh_t + p_{t+1}`, and `p_t = a_t g_t` is carried."""
    time = column_ref.shape[0]
    block = pl.num_programs(2) - 1 - pl.program_id(2)
    row = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, _LANES), 0)

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry_ref[...] = dh_last_ref[...]
        d_rate_ref[...] = jnp.zeros_like(d_rate_ref)

    def gate(rows, own):
        for group, lanes in _groups(a_ref):
            gate = _Gates(rate_ref[:, lanes], column_ref[rows, :])
            gate_a, dh = _read(rows, lanes, gate_a_ref, dh_ref)
            if length % time:  # what lies beyond the end may be anything
                dh = jnp.where(block * time + rows.start + row < length, dh, 0.0)
            a_ref[group, own, :], g_ref[group, own, :] = gate.decay(gate_a), dh

    def step(a, p, g_ref):
        g = g_ref[...] + p
        return a * g, g

    def finish(rows, own, state):
        before, d_rate = state
        for group, lanes in _groups(g_ref):
            gate = _Gates(rate_ref[:, lanes], column_ref[rows, :])
            v, gate_x, gate_a, h = _read(rows, lanes, v_ref, gate_x_ref, gate_a_ref, h_ref)
            previous = jnp.where(row == 0, before[group], pltpu.roll(h, 1, 0))
            *wide, d_step = gate.gradients(g_ref[group, own, :], previous, v, gate_x, gate_a)
            for ref, value in zip((dv_ref, d_gate_x_ref, d_gate_a_ref), wide):
                ref[0, rows, lanes] = value.astype(ref.dtype)
            before[group] = h[_ROWS - 1 :]
            d_rate[group] = d_rate[group] + d_step
        return before, d_rate

    _spread(forced_ref, column_ref)
    _each_rows(gate, column_ref)
    _recur(step, a_ref, g_ref, carry_ref, starts_ref, reverse=True)
    before, d_rate = [], []
    for _, lanes in _groups(g_ref):
        (ends,) = _read(slice(None), lanes, before_ref)
        before.append(jnp.where(block == 0, h0_ref[0, :, lanes], ends[_ROWS - 1 :]))
        d_rate.append(jnp.zeros((_ROWS, _LANES), jnp.float32))
    _, d_rate = _each_rows(finish, column_ref, (before, d_rate))
    for group, lanes in _groups(g_ref):
        d_rate_ref[0, :, lanes] += jnp.sum(d_rate[group], axis=0, keepdims=True)


def _groups(wide_ref: Any) -> list[tuple[int, slice]]:
    """Returns each group of lanes with its channels within the block."""
    count = wide_ref.shape[0]
    return [(group, slice(group * _LANES, (group + 1) * _LANES)) for group in range(count)]


def _read(rows: Any, lanes: slice, *refs: Any) -> list[jax.Array]:
    return [ref[0, rows, lanes].astype(jnp.float32) for ref in refs]


def _spread(row_ref: Any, column_ref: Any) -> None:
    """Turns a row of numbers, one per step, into a column, the same in every lane."""
    row = jnp.broadcast_to(row_ref[0], (_LANES, column_ref.shape[0]))
    column_ref[...] = row.T


def _each_rows(body: Callable[..., Any], column_ref: Any, state: Any = None) -> Any:
    """Calls `body(rows, own[, state])` for each group of rows in order.

    `rows` are those of the block, `own` the same within scratch.
    """
    time = column_ref.shape[0]

    def step(n, state):
        first = pl.multiple_of(n * _ROWS, _ROWS)
        stretch = jax.lax.div(n, time // _UNIT)
        rows, own = pl.ds(first, _ROWS), pl.ds(first + stretch, _ROWS)
        return body(rows, own) if state is None else body(rows, own, state)

    return jax.lax.fori_loop(0, time // _ROWS, step, state, unroll=_UNROLL)


def _recur(
    step: Callable[..., Any],
    a_ref: Any,
    value_ref: Any,
    carry_ref: Any,
    starts_ref: Any,
    *,
    reverse: bool,
) -> None:
    """Runs `carry, value = step(a, carry, value)` over a block's time, `value_ref` in place.

    Args:
      step: linear in the carry, which it multiplies by `a`.
      a_ref, value_ref: scratch.
      carry_ref: `[1, 1, C]`, the state before the block and, in the end, after it.
      starts_ref: scratch, for the state that each stretch starts from.
      reverse: from the last step to the first.
    """
    each = value_ref.shape[1] // _STRETCHES - 1
    everything = _groups(value_ref)

    def walk(body, state):
        def one(n, state):
            at = pl.ds(each - 1 - n if reverse else n, _STRETCHES, stride=each + 1)
            views = [(a_ref.at[group], value_ref.at[group]) for group, _ in everything]
            return [body(a[at, :], x.at[at, :], s) for (a, x), s in zip(views, state)]

        return jax.lax.fori_loop(0, each, one, state, unroll=_UNROLL)

    def survey(a, value_ref, state):
        product, carry = state
        return a * product, step(a, carry, value_ref)[0]

    def replay(a, value_ref, carry):
        carry, value_ref[...] = step(a, carry, value_ref)
        return carry

    one, zero = (jnp.full((_STRETCHES, _LANES), x, jnp.float32) for x in (1.0, 0.0))
    effects = walk(survey, [(one, zero) for _ in everything])
    for (group, lanes), (product, end) in zip(everything, effects):
        carry = carry_ref[0, :, lanes]
        for k in reversed(range(_STRETCHES)) if reverse else range(_STRETCHES):
            starts_ref[group, k : k + 1, :] = carry
            carry = product[k : k + 1] * carry + end[k : k + 1]
        carry_ref[0, :, lanes] = carry
    walk(replay, [starts_ref[group] for group, _ in everything])
