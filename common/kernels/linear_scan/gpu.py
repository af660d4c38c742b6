"""Linear recurrence on GPUs (Pallas through Triton): a thread per channel walks through time.

A program holds the states of some neighbouring channels of one batch row in registers, and fetches
the next few time steps while it works on the present ones; so many loads in flight are what keeps
the memory busy. All arrays pass once between memory and the chip.

Few channels cannot keep a whole GPU busy. Then time is cut into pieces that run side by side: a
first kernel summarises each piece (its product of decays, its end from zero), the summaries are
linked, and the pieces start from the states found, at the price of reading the inputs twice.

Within the kernels steps count in running order, whatever the direction of time.
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
from jax.experimental.pallas import triton as plgpu

from common.kernels import tuning
from common.kernels.linear_scan.xla import link

# Known, and the reason why each GPU kernel is a file of its own.
warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)

_WARP = 32
# What saturates a large GPU's memory: so many threads, with loads of so many bytes on their way in
# two groups of steps.
_THREADS = 16384
_BYTES_IN_FLIGHT = 5_000_000
_MAX_STEPS = 12
_SHORTEST_PIECE = 64

# What a kernel writes: `[B, L, D]`, or a state of each piece, `[B, pieces, D]`.
STEPS, STATE = "steps", "state"


class Blocks(NamedTuple):
    """Sizes that do not change the result.

    Attributes:
      channels: of one program, a power of two.
      steps: time steps that are fetched together.
      pieces: of time, that run side by side.
    """

    channels: int
    steps: int
    pieces: int


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
    plan = _plan("forward", (x, a), blocks, descending=reverse)
    starts = _starts(a, x, h0.astype(jnp.float32), plan, interpret, decayed=False)
    outputs = [(STEPS, x.dtype), (STATE, jnp.float32)]
    h, ends = _call(_forward_kernel, plan, [a, x, starts], outputs, interpret)
    return h, ends[:, -1]


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
    plan = _plan("backward", (h, a, dh), blocks, descending=not reverse)
    starts = _starts(a, dh, dh_last, plan, interpret, decayed=True)
    inputs = [a, dh, h, h0.astype(jnp.float32), starts]
    outputs = [(STEPS, a.dtype), (STEPS, h.dtype), (STATE, jnp.float32)]
    da, dx, ends = _call(_backward_kernel, plan, inputs, outputs, interpret)
    return da, dx, ends[:, -1].astype(h0.dtype)


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
    plan = _plan("summary", (x, a), blocks, descending=reverse)
    products, ends = _summaries(a, x, plan, interpret, decayed=decayed)
    if plan.pieces == 1:
        return products[:, 0], ends[:, 0]
    ends = link(products, ends, jnp.zeros_like(ends[:, 0]), reverse=False)
    return jnp.prod(products, axis=1), ends[:, -1]


def _starts(a, x, start, plan, interpret, *, decayed):
    """Returns the state before each piece, `[B, pieces, D]`."""
    if plan.pieces == 1:
        return start[:, None]
    products, ends = _summaries(a, x, plan, interpret, decayed=decayed)
    ends = link(products, ends, start, reverse=False)
    return jnp.concatenate([start[:, None], ends[:, :-1]], axis=1)


def _summaries(a, x, plan, interpret, *, decayed):
    """Returns each piece's product of decays and its end from zero, `[B, pieces, D]`."""
    outputs = [(STATE, jnp.float32)] * 2
    return _call(_summary_kernel, plan, [a, x], outputs, interpret, decayed=decayed)


# --- Kernels: `here` are the channels and the piece of time of one program. ---


def _forward_kernel(a_ref, x_ref, start_ref, h_ref, end_ref, *, plan):
    here = _Here(plan)

    def fetch(s):
        return here.load(a_ref, s), here.load(x_ref, s)

    def advance(s, h, fetched):
        a, x = map(_float, fetched)
        h = a * h + x
        here.store(h_ref, s, h)
        return h

    h = here.load_state(start_ref, here.piece)
    h = here.walk(plan.length, fetch, advance, h)
    here.store_state(end_ref, h)


def _backward_kernel(
    a_ref, dh_ref, h_ref, h0_ref, start_ref, da_ref, dx_ref, end_ref, *, plan
):  # fmt: skip
    here = _Here(plan)

    def fetch(s):
        # The recurrence ran the other way: it came to step s from step s + 1.
        before = here.load(h_ref, s + 1)
        return here.load(a_ref, s), here.load(dh_ref, s), before

    def advance(s, c, fetched):
        a, dh, before = map(_float, fetched)
        g = dh + c
        here.store(da_ref, s, g * before)
        here.store(dx_ref, s, g)
        return a * g

    c = here.load_state(start_ref, here.piece)
    c = here.walk(plan.length - 1, fetch, advance, c)
    # One step is left, which may be where the recurrence began.
    s, end = here.first + plan.length - 1, plan.shape[1] - 1
    before = _float(here.load(h_ref, jnp.minimum(s + 1, end)))
    before = jnp.where(s == end, here.load_state(h0_ref), before)
    c = advance(s, c, (here.load(a_ref, s), here.load(dh_ref, s), before))
    here.store_state(end_ref, c)


def _summary_kernel(a_ref, x_ref, product_ref, end_ref, *, plan, decayed):
    here = _Here(plan)

    def fetch(s):
        return here.load(a_ref, s), here.load(x_ref, s)

    def advance(s, carry, fetched):
        product, h = carry
        a, x = map(_float, fetched)
        return a * product, a * (h + x) if decayed else a * h + x

    ones = jnp.ones((plan.channels,), jnp.float32)
    product, h = here.walk(plan.length, fetch, advance, (ones, jnp.zeros_like(ones)))
    here.store_state(product_ref, product)
    here.store_state(end_ref, h)


def _float(array):
    return array.astype(jnp.float32)


class _Here:
    """The channels and the piece of time of one program."""

    def __init__(self, plan):
        self.plan = plan
        block, self.row, self.piece = (pl.program_id(axis) for axis in range(3))
        self.columns = pl.ds(block * plan.channels, plan.channels)
        width = plan.shape[2]
        inside = block * plan.channels + jnp.arange(plan.channels) < width
        self.inside = inside if width % plan.channels else None
        # Pieces are of one length; the steps left over come before the first.
        self.left_over = plan.shape[1] - plan.pieces * plan.length
        self.first = self.left_over + self.piece * plan.length

    def walk(self, count, fetch, advance, carry):
        """Takes `count` steps from `first` on, in groups, the next group already on its way.

        Args:
          count: static.
          fetch: from a step to what it reads.
          advance: `(step, carry, fetched) -> carry`.
        """
        group = self.plan.steps

        def fetch_group(i, size):
            return [fetch(self.first + i * group + j) for j in range(size)]

        def advance_group(i, carry, fetched):
            for j, values in enumerate(fetched):
                carry = advance(self.first + i * group + j, carry, values)
            return carry

        def body(i, state):
            # Two groups: the registers of one are loaded while those of the other are in use.
            carry, fetched = state
            other = fetch_group(2 * i + 1, group)
            carry = advance_group(2 * i, carry, fetched)
            fetched = fetch_group(2 * i + 2, group)
            return advance_group(2 * i + 1, carry, other), fetched

        if self.left_over:
            more = self.left_over * (1 - self.piece)  # not above zero but in the first piece
            carry = lax.fori_loop(0, more, lambda s, carry: advance(s, carry, fetch(s)), carry)
        full, rest = divmod(count, group)
        pairs = max(full - 1, 0) // 2
        state = carry, fetch_group(0, group if full else rest)
        carry, fetched = lax.fori_loop(0, pairs, body, state) if pairs else state
        for i in range(2 * pairs, full):
            following = fetch_group(i + 1, group if i + 1 < full else rest)
            carry, fetched = advance_group(i, carry, fetched), following
        return advance_group(full, carry, fetched)

    def load(self, ref, s):
        """Step `s` of `[B, L, D]`."""
        return self._load(self._at(ref, s))

    def store(self, ref, s, value):
        plgpu.store(self._at(ref, s), value.astype(ref.dtype), mask=self.inside)

    def load_state(self, ref, *piece):
        """A state of `[B, D]`, or that of a piece of `[B, pieces, D]`."""
        return self._load(ref.at[self.row, *piece, self.columns])

    def store_state(self, ref, value):
        plgpu.store(ref.at[self.row, self.piece, self.columns], value, mask=self.inside)

    def _at(self, ref, s):
        t = self.plan.shape[1] - 1 - s if self.plan.descending else s
        return ref.at[self.row, t, self.columns]

    def _load(self, view):
        return plgpu.load(view, mask=self.inside, other=None if self.inside is None else 0.0)


# --- The plan. ---


class _Plan(NamedTuple):
    """How `[B, L, D]` is cut.

    Attributes:
      shape: `(B, L, D)`.
      channels, steps, pieces: see `Blocks`.
      length: steps of a piece.
      descending: whether time runs from the last step to the first.
    """

    shape: tuple[int, int, int]
    channels: int
    steps: int
    pieces: int
    length: int
    descending: bool


def _plan(
    kernel: str, inputs: Sequence[jax.Array], blocks: Blocks | None, *, descending: bool
) -> _Plan:
    """Returns the plan of a kernel that reads `inputs`, `[B, L, D]`."""
    shape = inputs[0].shape
    channels, steps, pieces = blocks or _tuned(kernel, inputs)
    pieces = min(pieces, shape[1])
    return _Plan(shape, channels, steps, pieces, shape[1] // pieces, descending)


def _tuned(kernel: str, inputs: Sequence[jax.Array]) -> Blocks:
    batch, length, width = inputs[0].shape
    bytes_a_step = sum(array.dtype.itemsize for array in inputs)
    steps = _BYTES_IN_FLIGHT // (2 * bytes_a_step * max(_THREADS, batch * width))
    default = {
        "channels": min(_WARP, pl.next_power_of_2(width)),
        "steps": max(4, min(_MAX_STEPS, steps)),
        "threads": _THREADS,
    }
    shape = {"B": batch, "L": length, "D": width}
    dtype = inputs[0].dtype
    sizes = tuning.blocks(Path(__file__).parent, kernel, dtype, shape, default)
    pieces = max(1, min(sizes["threads"] // (batch * width), length // _SHORTEST_PIECE))
    return Blocks(sizes["channels"], min(sizes["steps"], pl.cdiv(length, 4 * pieces)), pieces)


def _call(
    kernel: Callable[..., None],
    plan: _Plan,
    inputs: Sequence[jax.Array],
    outputs: Sequence[tuple[str, Any]],
    interpret: bool,
    **options: Any,
) -> Sequence[jax.Array]:
    """Runs a program of `kernel` for every block of channels, batch row and piece of time."""
    batch, _, width = plan.shape
    shapes = {STEPS: plan.shape, STATE: (batch, plan.pieces, width)}
    varying = jax.typeof(inputs[0]).manual_axis_type
    return pl.pallas_call(
        functools.partial(kernel, plan=plan, **options),
        grid=(pl.cdiv(width, plan.channels), batch, plan.pieces),
        out_shape=[
            jax.ShapeDtypeStruct(shapes[part], dtype, manual_axis_type=varying)
            for part, dtype in outputs
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=max(1, plan.channels // _WARP), num_stages=1
        ),
        interpret=interpret,
        name=f"linear_scan_{kernel.__name__.strip('_')}",
    )(*inputs)
