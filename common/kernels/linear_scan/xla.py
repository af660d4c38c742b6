"""Linear recurrence in plain XLA: an in-place loop for CPUs, a two-level scan for accelerators.

Both forms come as a forward and a backward function. The backward of `h_t = a_t h_{t-1} + x_t` is
the same recurrence run against time: with `g_t` the gradient of the loss with respect to `h_t`,

    g_t = dh_t + a_{t+1} g_{t+1},    dx_t = g_t,    da_t = g_t h_{t-1},    dh0 = a_1 g_1.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

_MAX_CHUNK = 64


def forward(
    a: jax.Array, x: jax.Array, h0: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns `h` `[B, L, D]` in the dtype of `x` and `h_last` `[B, D]` in float32."""
    return lax.platform_dependent(
        a,
        x,
        h0,
        cpu=lambda a, x, h0: loop_forward(a, x, h0, reverse=reverse),
        default=lambda a, x, h0: chunked_forward(a, x, h0, reverse=reverse),
    )


def backward(
    a: jax.Array,
    h: jax.Array,
    h0: jax.Array,
    dh: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(da, dx, dh0)` in the dtypes of `a`, `h` and `h0`."""
    return lax.platform_dependent(
        a,
        h,
        h0,
        dh,
        dh_last,
        cpu=lambda *operands: loop_backward(*operands, reverse=reverse),
        default=lambda *operands: chunked_backward(*operands, reverse=reverse),
    )


def summary(
    a: jax.Array, x: jax.Array, *, reverse: bool, decayed: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns what a sequence does to any state: `h_last = product * h0 + last`.

    Args:
      a: `[B, L, D]`.
      x: `[B, L, D]`.
      reverse: Runs from the last step to the first.
      decayed: Takes `a_t (h_{t-1} + x_t)` for a step: what the gradient does, with `dh` for `x`.

    Returns:
      The product of all decays, and the last state from zero, `[B, D]` in float32.
    """
    batch, length, width = x.shape
    size = chunk_size(length)
    padding = -length % size
    edges = (padding, 0) if reverse else (0, padding)
    chunks = _chunks(a, edges, size, 1), _chunks(x, edges, size, 0)
    product, local = (
        part.reshape(batch, -1, width)
        for part in _summaries(*chunks, reverse=reverse, decayed=decayed)
    )
    ends = link(product, local, jnp.zeros((batch, width), jnp.float32), reverse=reverse)
    return jnp.prod(product, axis=1), ends[:, 0 if reverse else -1]


# --- In-place loop: each state is read back from the output it was written to. ---


def loop_forward(
    a: jax.Array, x: jax.Array, h0: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Steps through time with the float32 output as its only state."""
    first, last = (-1, 0) if reverse else (0, -1)
    h = _loop(a, x, _float(a[:, first]) * _float(h0) + _float(x[:, first]), reverse=reverse)
    return h.astype(x.dtype), h[:, last]


def loop_backward(
    a: jax.Array,
    h: jax.Array,
    h0: jax.Array,
    dh: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steps against the forward direction for `dx`; `da` follows in one elementwise pass.

    Writing `da` inside the loop as well would need the carried gradient as a value of its own,
    and costs half as much again: the separate pass runs on all cores.
    """
    first, last = (-1, 0) if reverse else (0, -1)
    g_last = _float(dh[:, last]) + dh_last
    g = _loop(a, dh, g_last, reverse=not reverse, decay_of_previous=True)
    da = g * _previous(h, h0, reverse=reverse)
    dh0 = _float(a[:, first]) * g[:, first]
    return da.astype(a.dtype), g.astype(h.dtype), dh0.astype(h0.dtype)


def _loop(
    a: jax.Array,
    x: jax.Array,
    first: jax.Array,
    *,
    reverse: bool,
    decay_of_previous: bool = False,
) -> jax.Array:
    """Returns `y_t = a_t y_{t-1} + x_t` in float32, its first step given.

    One fused kernel a step updates the buffer in place. More steps per iteration, or the state as a
    second loop variable, make XLA copy: the whole buffer in the first case.

    Args:
        a: `[B, L, D]`.
        x: `[B, L, D]`.
        first: The first step of the result, `[B, D]` float32.
        reverse: Runs from the last step to the first.
        decay_of_previous: Multiplies with `a` of the step come from, not of the step gone to.
    """
    length = x.shape[1]

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        t, before = (length - 1 - i, length - i) if reverse else (i, i - 1)
        decay = _at(a, before if decay_of_previous else t)
        return _put(y, decay * _at(y, before) + _at(x, t), t)

    y = _put(jnp.zeros_like(x, dtype=jnp.float32), first, length - 1 if reverse else 0)
    return lax.fori_loop(1, length, step, y)


def _at(array: jax.Array, t: jax.Array | int) -> jax.Array:
    """Returns time step `t` of `[B, L, D]` as float32 `[B, D]`."""
    return _float(
        lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False, allow_negative_indices=False)
    )


def _put(array: jax.Array, value: jax.Array, t: jax.Array | int) -> jax.Array:
    """Writes `[B, D]` into time step `t` of `[B, L, D]`."""
    return lax.dynamic_update_index_in_dim(array, value, t, axis=1, allow_negative_indices=False)


def _float(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


def _previous(h: jax.Array, h0: jax.Array, *, reverse: bool) -> jax.Array:
    """Returns the state that each step came from, `[B, L, D]` in float32."""
    h, start = _float(h), _float(h0)[:, None]
    parts = [h[:, 1:], start] if reverse else [start, h[:, :-1]]
    return jnp.concatenate(parts, axis=1)


# --- Two levels: about 2 sqrt(L) wide steps in place of L narrow ones. ---


def chunked_forward(
    a: jax.Array, x: jax.Array, h0: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Summarises all chunks side by side, links the summaries, then replays every chunk.

    Replaying reads `a` and `x` a second time, which moves less memory than storing each chunk's
    local states and running products and correcting them afterwards.
    """
    batch, length, width = x.shape
    size = chunk_size(length)
    count = -(-length // size)
    padding = count * size - length
    edges = (padding, 0) if reverse else (0, padding)
    a_chunks = _chunks(a, edges, size, 1)
    x_chunks = _chunks(x, edges, size, 0)
    product, local = _summaries(a_chunks, x_chunks, reverse=reverse)
    shape = (batch, count, width)
    h0 = _float(h0)
    ends = link(product.reshape(shape), local.reshape(shape), h0, reverse=reverse)
    parts = [ends[:, 1:], h0[:, None]] if reverse else [h0[:, None], ends[:, :-1]]
    starts = jnp.concatenate(parts, axis=1).reshape(batch * count, width)
    first = -1 if reverse else 0
    first_states = _float(a_chunks[:, first]) * starts + _float(x_chunks[:, first])
    h = _loop(a_chunks, x_chunks, first_states, reverse=reverse)
    h = h.astype(x.dtype).reshape(batch, count * size, width)
    h = lax.slice_in_dim(h, edges[0], edges[0] + length, axis=1)
    return h, ends[:, 0] if reverse else ends[:, -1]


def chunked_backward(
    a: jax.Array,
    h: jax.Array,
    h0: jax.Array,
    dh: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The forward scan turned round, on `a` shifted by one step."""
    one = jnp.ones_like(a[:, :1])
    parts = [one, a[:, :-1]] if reverse else [a[:, 1:], one]
    shifted = jnp.concatenate(parts, axis=1)
    g, g_first = chunked_forward(shifted, _float(dh), dh_last, reverse=not reverse)
    da = g * _previous(h, h0, reverse=reverse)
    dh0 = _float(a[:, -1 if reverse else 0]) * g_first
    return da.astype(a.dtype), g.astype(h.dtype), dh0.astype(h0.dtype)


def chunk_size(length: int) -> int:
    """Returns the number of time steps in a chunk: near sqrt(length), a power of two."""
    return min(_MAX_CHUNK, 2 ** round(math.log2(max(1.0, math.sqrt(length)))))


def _chunks(array: jax.Array, edges: tuple[int, int], size: int, fill: int) -> jax.Array:
    """Pads `[B, L, D]` in time and returns its chunks as rows, `[B * count, size, D]`."""
    padded = jnp.pad(array, ((0, 0), edges, (0, 0)), constant_values=fill)
    return padded.reshape(-1, size, array.shape[2])


def _summaries(
    a: jax.Array, x: jax.Array, *, reverse: bool, decayed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns each chunk's product of decays and its last state from zero, `[B * count, D]`."""
    size = x.shape[1]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        product, state = carry
        t = size - 1 - i if reverse else i
        decay, x_t = _at(a, t), _at(x, t)
        return decay * product, decay * (state + x_t) if decayed else decay * state + x_t

    t = size - 1 if reverse else 0
    first, x_first = _at(a, t), _at(x, t)
    return lax.fori_loop(1, size, step, (first, first * x_first if decayed else x_first))


def link(product: jax.Array, local: jax.Array, h0: jax.Array, *, reverse: bool) -> jax.Array:
    """Returns the state after each chunk `[B, count, D]`."""

    def combine(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    products, states = lax.associative_scan(combine, (product, local), reverse=reverse, axis=1)
    return products * h0[:, None] + states
