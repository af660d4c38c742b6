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


# --- In-place loop: every element is read once and written once. ---


def loop_forward(
    a: jax.Array, x: jax.Array, h0: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Steps through time, writing each state into the one output buffer."""
    length = x.shape[1]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, h = carry
        t = length - 1 - i if reverse else i
        state = _at(a, t) * state + _at(x, t)
        return state, _put(h, state, t)

    h_last, h = lax.fori_loop(0, length, step, (h0.astype(jnp.float32), jnp.zeros_like(x)))
    return h, h_last


def loop_backward(
    a: jax.Array,
    h: jax.Array,
    h0: jax.Array,
    dh: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs against the forward direction; one pass writes both `da` and `dx`."""
    length = h.shape[1]

    def write(
        t: jax.Array | int, previous: jax.Array, carry: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        incoming, da, dx = carry
        g = _at(dh, t) + incoming
        return _at(a, t) * g, _put(da, g * previous, t), _put(dx, g, t)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        t = i if reverse else length - 1 - i
        return write(t, _at(h, t + 1 if reverse else t - 1), carry)

    carry = (dh_last.astype(jnp.float32), jnp.zeros_like(a), jnp.zeros_like(h))
    carry = lax.fori_loop(0, length - 1, step, carry)
    first = length - 1 if reverse else 0
    dh0, da, dx = write(first, h0.astype(jnp.float32), carry)
    return da, dx, dh0.astype(h0.dtype)


def _at(array: jax.Array, t: jax.Array | int) -> jax.Array:
    """Returns time step `t` of `[B, L, D]` as float32 `[B, D]`."""
    return lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False).astype(jnp.float32)


def _put(array: jax.Array, value: jax.Array, t: jax.Array | int) -> jax.Array:
    """Writes `[B, D]` into time step `t` of `[B, L, D]`."""
    return lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), t, axis=1)


# --- Two levels: about 3 sqrt(L) wide steps in place of L narrow ones. ---


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
    a_chunks = _chunks(a, edges, count, 1)
    x_chunks = _chunks(x, edges, count, 0)
    h0 = h0.astype(jnp.float32)

    def summarise(
        carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        product, state = carry
        a_t, x_t = (value.astype(jnp.float32) for value in inputs)
        return (a_t * product, a_t * state + x_t), None

    shape = (batch, count, width)
    start = (jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
    (product, local), _ = lax.scan(summarise, start, (a_chunks, x_chunks), reverse=reverse)
    ends = _link(product, local, h0, reverse=reverse)
    if reverse:
        starts = jnp.concatenate([ends[:, 1:], h0[:, None]], axis=1)
    else:
        starts = jnp.concatenate([h0[:, None], ends[:, :-1]], axis=1)

    def replay(
        state: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        a_t, x_t = (value.astype(jnp.float32) for value in inputs)
        state = a_t * state + x_t
        return state, state.astype(x.dtype)

    _, h = lax.scan(replay, starts, (a_chunks, x_chunks), reverse=reverse)
    h = jnp.moveaxis(h, 0, 2).reshape(batch, count * size, width)
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
    h0_row = h0[:, None].astype(h.dtype)
    one = jnp.ones_like(a[:, :1])
    if reverse:
        shifted = jnp.concatenate([one, a[:, :-1]], axis=1)
        previous = jnp.concatenate([h[:, 1:], h0_row], axis=1)
    else:
        shifted = jnp.concatenate([a[:, 1:], one], axis=1)
        previous = jnp.concatenate([h0_row, h[:, :-1]], axis=1)
    g, g_first = chunked_forward(shifted, dh.astype(jnp.float32), dh_last, reverse=not reverse)
    a_first = a[:, -1] if reverse else a[:, 0]
    dh0 = a_first.astype(jnp.float32) * g_first
    da = g * previous.astype(jnp.float32)
    return da.astype(a.dtype), g.astype(h.dtype), dh0.astype(h0.dtype)


def chunk_size(length: int) -> int:
    """Returns the number of time steps in a chunk: near sqrt(length), a power of two."""
    return min(_MAX_CHUNK, 2 ** round(math.log2(max(1.0, math.sqrt(length)))))


def _chunks(array: jax.Array, edges: tuple[int, int], count: int, fill: int) -> jax.Array:
    """Pads `[B, L, D]` in time and returns `[size, B, count, D]`."""
    padded = jnp.pad(array, ((0, 0), edges, (0, 0)), constant_values=fill)
    split = padded.reshape(array.shape[0], count, -1, array.shape[2])
    return jnp.moveaxis(split, 2, 0)


def _link(product: jax.Array, local: jax.Array, h0: jax.Array, *, reverse: bool) -> jax.Array:
    """Returns the state after each chunk `[B, count, D]`."""

    def combine(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    products, states = lax.associative_scan(combine, (product, local), reverse=reverse, axis=1)
    return products * h0[:, None] + states
