"""The gates of the RG-LRU: what one step does, as plain JAX and as the kernels compute it.

With v the input and two pre-activations, `i, r = sigmoid(gate_x), sigmoid(gate_a)` (Griffin, eq.
1-4; RecurrentGemma, section 2):

    log a = -8 r softplus(Lambda),  m = sqrt(1 - a^2),  h_t = a_t h_{t-1} + m_t i_t v_t.

A document starts with a = 0 and m = 1. A token that is not valid has a = 1 and no input.
"""

import math

import jax
import jax.numpy as jnp

# Slope limit of the input multiplier's square root (RecurrentGemma, section 2).
MAX_SQRT_SLOPE = 1000.0
# The constant c of a_t = a^(c r_t) (Griffin, eq. 3).
DECAY_EXPONENT = 8.0

# What a step is to the kernels, which read one mark in place of two masks.
STEP, RESET, HOLD, OUTSIDE = 0, 1, 2, 3


@jax.custom_vjp
def sqrt_with_bounded_slope(x: jax.Array) -> jax.Array:
    """`sqrt(x)` whose derivative is never steeper than `MAX_SQRT_SLOPE`: finite at x = 0."""
    return jnp.sqrt(x)


def _sqrt_forward(x):
    return jnp.sqrt(x), x


def _sqrt_backward(x, g):
    return (g / (2.0 * jnp.sqrt(jnp.maximum(x, 1.0 / (4.0 * MAX_SQRT_SLOPE**2)))),)


sqrt_with_bounded_slope.defvjp(_sqrt_forward, _sqrt_backward)


def coefficients(
    v: jax.Array,
    gate_x: jax.Array,
    gate_a: jax.Array,
    a_param: jax.Array,
    reset: jax.Array,
    valid: jax.Array | None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Returns the recurrence's `a_t` and its input `m_t i_t v_t`, each `[B, L, E]` float32.

    Args:
      v, gate_x, gate_a: `[B, L, E]`.
      a_param: Lambda `[E]`.
      reset, valid: `[B or 1, L]`.
      dtype: of the gates. In bfloat16 a decay of .999 is 1.
    """
    dtype = jnp.dtype(dtype)
    i = jax.nn.sigmoid(gate_x.astype(dtype))
    r = jax.nn.sigmoid(gate_a.astype(dtype))
    log_a = -DECAY_EXPONENT * r * jax.nn.softplus(a_param.astype(dtype))
    a = jnp.exp(log_a)
    # 1 - exp(2 log a) without the cancellation near a = 1.
    m = sqrt_with_bounded_slope(-jnp.expm1(2.0 * log_a))
    starts = reset[..., None]
    m = jnp.where(starts, jnp.ones((), dtype), m)
    a = jnp.where(starts, jnp.zeros((), dtype), a)
    x = m * i * v.astype(dtype)
    if valid is not None:
        real = valid[..., None]
        a, x = jnp.where(real, a, 1), jnp.where(real, x, 0)
    return a.astype(jnp.float32), x.astype(jnp.float32)


def product_of_decays(
    gate_a: jax.Array, a_param: jax.Array, reset: jax.Array, valid: jax.Array | None
) -> jax.Array:
    """Returns the product of all `a_t`, `[B, E]` float32, in one pass over `gate_a`."""
    taken = jnp.ones_like(reset) if valid is None else valid
    r = jnp.where((taken & ~reset)[..., None], jax.nn.sigmoid(gate_a.astype(jnp.float32)), 0.0)
    ended = jnp.any(reset & taken, axis=1)[:, None]
    return jnp.where(ended, 0.0, jnp.exp(-rates(a_param) * jnp.sum(r, axis=1)))


# --- Of the kernels: float32 blocks, broadcast against one mark per row and one rate per channel.


def rates(a_param: jax.Array) -> jax.Array:
    """Returns `-log a` at r = 1, `[E]` float32."""
    return DECAY_EXPONENT * jax.nn.softplus(a_param.astype(jnp.float32))


def d_a_param(a_param: jax.Array, d_rates: jax.Array) -> jax.Array:
    """Returns Lambda's gradient from that of `rates`, which comes in parts `[..., E]`."""
    total = jnp.sum(d_rates, axis=tuple(range(d_rates.ndim - 1)))
    slope = DECAY_EXPONENT * jax.nn.sigmoid(a_param.astype(jnp.float32))
    return (total * slope).astype(a_param.dtype)


def marks(
    reset: jax.Array, valid: jax.Array | None, shape: tuple[int, int], length: int
) -> jax.Array:
    """Returns what each step is, `[B, length]` int32.

    Args:
      reset, valid: `[B or 1, L]`.
      shape: (B, L).
      length: at least L; the rest is OUTSIDE.
    """
    mark = jnp.where(reset, RESET, STEP)
    if valid is not None:
        mark = jnp.where(valid, mark, HOLD)
    mark = jnp.broadcast_to(mark, shape).astype(jnp.int32)
    return jnp.pad(mark, ((0, 0), (0, length - shape[1])), constant_values=OUTSIDE)


def decay(gate_a: jax.Array, rate: jax.Array, mark: jax.Array) -> jax.Array:
    """Returns `a_t`."""
    a = jnp.exp(-rate * jax.nn.sigmoid(gate_a))
    return jnp.where(mark == STEP, a, jnp.where(mark == RESET, 0.0, 1.0))


def decay_and_input(
    v: jax.Array, gate_x: jax.Array, gate_a: jax.Array, rate: jax.Array, mark: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `a_t` and `m_t i_t v_t`."""
    log_a = -rate * jax.nn.sigmoid(gate_a)
    a = jnp.exp(log_a)
    m = jnp.where(mark == RESET, 1.0, jnp.sqrt(_one_minus_square(a, log_a)))
    x = m * jax.nn.sigmoid(gate_x) * v
    a = jnp.where(mark == STEP, a, jnp.where(mark == RESET, 0.0, 1.0))
    return a, jnp.where(mark < HOLD, x, 0.0)


def gradients(
    g: jax.Array,
    before: jax.Array,
    v: jax.Array,
    gate_x: jax.Array,
    gate_a: jax.Array,
    rate: jax.Array,
    mark: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns `(dv, d_gate_x, d_gate_a, d_rate)` of one step.

    Args:
      g: gradient with respect to `h_t`.
      before: `h_{t-1}`.
      v, gate_x, gate_a, rate, mark: as in the forward direction.
    """
    i, r = jax.nn.sigmoid(gate_x), jax.nn.sigmoid(gate_a)
    log_a = -rate * r
    a = jnp.exp(log_a)
    root = jnp.sqrt(_one_minus_square(a, log_a))
    m = jnp.where(mark == RESET, 1.0, root)
    taken = mark < HOLD
    dv = jnp.where(taken, g * m * i, 0.0)
    d_gate_x = jnp.where(taken, g * m * v * i * (1.0 - i), 0.0)
    slope = a / jnp.maximum(root, 0.5 / MAX_SQRT_SLOPE)  # dm = -a^2 / m dlog_a
    d_rate = jnp.where(mark == STEP, -r * a * g * (before - slope * i * v), 0.0)
    return dv, d_gate_x, rate * (1.0 - r) * d_rate, d_rate


def _one_minus_square(a: jax.Array, log_a: jax.Array) -> jax.Array:
    """Returns `1 - a^2` to float32's precision for every a; Mosaic has no `expm1`."""
    y = -2.0 * log_a
    # Where 1 - a * a would cancel: six terms of 1 - exp(-y), wrong by less than 5e-8 of it.
    series = jnp.zeros_like(y)
    for n in range(6, 0, -1):
        series = 1.0 / math.factorial(n) - y * series
    return jnp.where(y < 0.25, y * series, 1.0 - a * a)
