"""RG-LRU for GPUs (Pallas through Triton): gates and recurrence in one pass over memory each way.

A program walks through time for a few channels, the state in registers, reading the rows of the
next steps before it computes those of the present ones. With too few channels to fill the device,
time is cut into stretches: a first pass finds what each does to any state (its product of decays,
and its end from zero), the stretches are linked, and a second pass runs all of them at once.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton as plgpu

from common.kernels import tuning
from common.kernels.rg_lru import gates

# `walkers`: the channels times stretches of time that keep a device busy.
_FORWARD = {"channels": 32, "steps": 8, "walkers": 16384}
_BACKWARD = {"channels": 32, "steps": 4, "walkers": 16384}
_SHORTEST = 64  # steps of a stretch


class _Plan(NamedTuple):
    """How the work is cut.

    Attributes:
      stretches, stretch: how many, and the steps of one.
      channels: of one program.
      steps: read ahead, and computed, together.
    """

    stretches: int
    stretch: int
    channels: int
    steps: int


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
    operands = v, gate_x, gate_a, a_param, h0, reset, valid
    return _forward(*operands, plan=_plan("forward", v, _FORWARD), interpret=interpret)


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
    operands = v, gate_x, gate_a, a_param, h0, reset, valid, h, dh, dh_last
    return _backward(*operands, plan=_plan("backward", v, _BACKWARD), interpret=interpret)


def _plan(kernel: str, v: jax.Array, default: dict[str, int]) -> _Plan:
    batch, length, width = v.shape
    shape = {"B": batch, "L": length, "E": width}
    cut = tuning.blocks(Path(__file__).parent, f"gpu_{kernel}", v.dtype, shape, default)
    wanted = pl.cdiv(cut["walkers"], batch * width)
    stretches = max(1, min(wanted, length // _SHORTEST))
    stretch = pl.cdiv(pl.cdiv(length, stretches), cut["steps"]) * cut["steps"]
    return _Plan(pl.cdiv(length, stretch), stretch, cut["channels"], cut["steps"])


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _forward(v, gate_x, gate_a, a_param, h0, reset, valid, *, plan, interpret):
    batch, _, width = v.shape
    forced, rate = _forced(reset, valid, v.shape, plan), gates.rates(a_param)
    states = jax.ShapeDtypeStruct((batch, plan.stretches, width), jnp.float32)
    call = functools.partial(_call, v.shape, plan, interpret)
    starts = h0.astype(jnp.float32)[:, None]
    if plan.stretches > 1:
        effects = call(_ends_kernel, [states, states], forced, rate, v, gate_x, gate_a)
        starts = _link(effects, starts, reverse=False)
    wide = jax.ShapeDtypeStruct(v.shape, v.dtype)
    h, ends = call(_forward_kernel, [wide, states], forced, rate, starts, v, gate_x, gate_a)
    return h, ends[:, -1]


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _backward(v, gate_x, gate_a, a_param, h0, reset, valid, h, dh, dh_last, *, plan, interpret):
    batch, _, width = v.shape
    forced, rate = _forced(reset, valid, v.shape, plan), gates.rates(a_param)
    states = jax.ShapeDtypeStruct((batch, plan.stretches, width), jnp.float32)
    call = functools.partial(_call, v.shape, plan, interpret)
    starts = dh_last.astype(jnp.float32)[:, None]
    if plan.stretches > 1:
        effects = call(_backward_ends_kernel, [states, states], forced, rate, gate_a, dh)
        starts = _link(effects, starts, reverse=True)
    wide = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, gate_x, gate_a)]
    operands = forced, rate, starts, h0, v, gate_x, gate_a, dh, h
    *gradients, d_rate, carries = call(_backward_kernel, [*wide, states, states], *operands)
    return *gradients, gates.d_a_param(a_param, d_rate), carries[:, 0].astype(h0.dtype)


def _forced(reset: Any, valid: Any, shape: tuple[int, ...], plan: _Plan) -> jax.Array:
    """Returns `gates.forced_log_decay` of all steps that are read, those read ahead included."""
    length = plan.stretches * plan.stretch + plan.steps
    return gates.forced_log_decay(reset, valid, (shape[0], shape[1]), length)


def _call(
    shape: tuple[int, ...],
    plan: _Plan,
    interpret: bool,
    kernel: Callable[..., None],
    results: list[jax.ShapeDtypeStruct],
    *operands: jax.Array,
) -> Any:
    """Runs a kernel for every row, stretch and block of channels of a `[B, L, E]` array."""
    batch, length, width = shape
    return pl.pallas_call(
        functools.partial(kernel, plan=plan, length=length, width=width),
        grid=(batch, plan.stretches, pl.cdiv(width, plan.channels)),
        out_shape=results,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=f"rg_lru{kernel.__name__.removesuffix('_kernel')}",
    )(*operands)


def _link(effects: Sequence[jax.Array], first: jax.Array, *, reverse: bool) -> jax.Array:
    """Returns what each stretch starts from, `[B, stretches, E]`.

    Args:
      effects: what each stretch multiplies a state by, and what it makes of none.
      first: `[B, 1, E]`, what the first one, or with `reverse` the last one, starts from.
    """

    def combine(earlier: Any, later: Any) -> Any:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    products, ends = lax.associative_scan(combine, tuple(effects), reverse=reverse, axis=1)
    after = products * first + ends
    parts = [after[:, 1:], first] if reverse else [first, after[:, :-1]]
    return jnp.concatenate(parts, axis=1)


# --- Inside the kernels: references to whole arrays; a value is of one program's channels.


class _Program:
    """One row, stretch and block of channels; reads and writes of what lies there."""

    def __init__(self, plan: _Plan, length: int, width: int):
        self.row, self.stretch = pl.program_id(0), pl.program_id(1)
        first = pl.program_id(2) * plan.channels
        self.channels = pl.ds(first, plan.channels)
        self.inside = first + jnp.arange(plan.channels) < width
        self.begin, self.length, self.plan = self.stretch * plan.stretch, length, plan

    def read(self, ref: Any, *index: Any) -> jax.Array:
        """Reads the channels of `ref[index]`."""
        at = ref.at[*index, self.channels]
        return plgpu.load(at, mask=self.inside, other=0.0).astype(jnp.float32)

    def write(self, ref: Any, value: jax.Array, *index: Any) -> None:
        plgpu.store(ref.at[*index, self.channels], value.astype(ref.dtype), mask=self.inside)

    def read_step(self, ref: Any, t: jax.Array) -> jax.Array:
        """Reads a step of `[B, L, E]` in its own dtype, zeros outside."""
        there = self.inside & (t >= 0) & (t < self.length)
        return plgpu.load(ref.at[self.row, t, self.channels], mask=there, other=0.0)

    def write_step(self, ref: Any, value: jax.Array, t: jax.Array) -> None:
        at, there = ref.at[self.row, t, self.channels], self.inside & (t < self.length)
        plgpu.store(at, value.astype(ref.dtype), mask=there)

    def walk(
        self,
        body: Callable[..., Any],
        state: Any,
        forced_ref: Any,
        rate_ref: Any,
        *refs: tuple[Any, int],
        reverse: bool = False,
    ) -> Any:
        """Calls `body(t, gate, values, state)` at each step of the stretch.

        Args:
          body: returns the new state.
          state: before the first step.
          forced_ref, rate_ref: what makes the `gate` of a step.
          refs: arrays `[B, L, E]` to read, with the offset in time of the step to read.
          reverse: walks from the last step to the first.
        """
        steps, rate = self.plan.steps, self.read(rate_ref)
        sign = -1 if reverse else 1
        first = self.begin + (self.plan.stretch - 1 if reverse else 0)

        def times(n):
            return [first + sign * (n * steps + u) for u in range(steps)]

        def fetch(n):
            return [
                (
                    forced_ref[self.row, jnp.maximum(t, 0)],
                    [self.read_step(ref, t + offset) for ref, offset in refs],
                )
                for t in times(n)
            ]

        def advance(n, carry):
            state, rows = carry
            ahead = fetch(n + 1)
            for t, (forced, values) in zip(times(n), rows):
                gate = gates.Gates(rate, jnp.full_like(rate, forced), lambda x: 1.0 / x)
                state = body(t, gate, [x.astype(jnp.float32) for x in values], state)
            return state, ahead

        state, _ = lax.fori_loop(0, self.plan.stretch // steps, advance, (state, fetch(0)))
        return state

    def constant(self, value: float) -> jax.Array:
        return jnp.full((self.plan.channels,), value, jnp.float32)


def _forward_kernel(
    forced_ref, rate_ref, starts_ref, v_ref, gate_x_ref, gate_a_ref, h_ref, ends_ref, **sizes
):
    at = _Program(**sizes)

    def step(t, gate, values, h):
        a, x = gate.decay_and_input(*values)
        h = a * h + x
        at.write_step(h_ref, h, t)
        return h

    refs = (v_ref, 0), (gate_x_ref, 0), (gate_a_ref, 0)
    start = at.read(starts_ref, at.row, at.stretch)
    h = at.walk(step, start, forced_ref, rate_ref, *refs)
    at.write(ends_ref, h, at.row, at.stretch)


def _ends_kernel(
    forced_ref, rate_ref, v_ref, gate_x_ref, gate_a_ref, products_ref, ends_ref, **sizes
):
    at = _Program(**sizes)

    def step(t, gate, values, state):
        product, h = state
        a, x = gate.decay_and_input(*values)
        return a * product, a * h + x

    start = at.constant(1.0), at.constant(0.0)
    refs = (v_ref, 0), (gate_x_ref, 0), (gate_a_ref, 0)
    product, h = at.walk(step, start, forced_ref, rate_ref, *refs)
    at.write(products_ref, product, at.row, at.stretch)
    at.write(ends_ref, h, at.row, at.stretch)


def _backward_ends_kernel(
    forced_ref, rate_ref, gate_a_ref, dh_ref, products_ref, ends_ref, **sizes
):
    at = _Program(**sizes)

    def step(t, gate, values, state):
        product, carry = state
        gate_a, dh = values
        a = gate.decay(gate_a)
        return a * product, a * (dh + carry)

    start = at.constant(1.0), at.constant(0.0)
    refs = (gate_a_ref, 0), (dh_ref, 0)
    product, carry = at.walk(step, start, forced_ref, rate_ref, *refs, reverse=True)
    at.write(products_ref, product, at.row, at.stretch)
    at.write(ends_ref, carry, at.row, at.stretch)


def _backward_kernel(
    forced_ref, rate_ref, starts_ref, h0_ref, v_ref, gate_x_ref, gate_a_ref, dh_ref, h_ref,
    dv_ref, d_gate_x_ref, d_gate_a_ref, d_rate_ref, carries_ref, **sizes,
):  # fmt: skip
    """With `g_t` the gradient of `h_t`: `g_t = dh_t + p_{t+1}`, and `p_t = a_t g_t` is carried."""
    at = _Program(**sizes)
    h0 = at.read(h0_ref, at.row)

    def step(t, gate, values, state):
        carry, d_rate = state
        v, gate_x, gate_a, dh, before = values
        g = dh + carry
        before = jnp.where(t == 0, h0, before)
        *wide, d_step = gate.gradients(g, before, v, gate_x, gate_a)
        for ref, value in zip((dv_ref, d_gate_x_ref, d_gate_a_ref), wide):
            at.write_step(ref, value, t)
        return gate.decay(gate_a) * g, d_rate + d_step

    start = at.read(starts_ref, at.row, at.stretch), at.constant(0.0)
    refs = (v_ref, 0), (gate_x_ref, 0), (gate_a_ref, 0), (dh_ref, 0), (h_ref, -1)
    carry, d_rate = at.walk(step, start, forced_ref, rate_ref, *refs, reverse=True)
    at.write(carries_ref, carry, at.row, at.stretch)
    at.write(d_rate_ref, d_rate, at.row, at.stretch)
