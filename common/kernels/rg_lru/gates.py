"""The gates of the RG-LRU: what one step does, as plain JAX and as the kernels compute it.

With v the input and two pre-activations, `i, r = sigmoid(gate_x), sigmoid(gate_a)` (Griffin, eq.
1-4; RecurrentGemma, section 2):

    log a = -8 r softplus(Lambda),  m = sqrt(1 - a^2),  h_t = a_t h_{t-1} + m_t i_t v_t.

A document starts with a = 0 and m = 1. A token that is not valid has a = 1 and no input.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Slope limit of the input multiplier's square root (RecurrentGemma, section 2).
MAX_SQRT_SLOPE = 1000.0
# The constant c of a_t = a^(c r_t) (Griffin, eq. 3).
DECAY_EXPONENT = 8.0

_LN2 = math.log(2.0)


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
    return jnp.where(ended, 0.0, jnp.exp2(-rates(a_param) * jnp.sum(r, axis=1)))


# --- Of the kernels: float32, logarithms in base 2, and one number per step in place of two masks.

FREE, RESET, HOLD = 1.0, -200.0, 0.0


def forced_log_decay(
    reset: jax.Array, valid: jax.Array | None, shape: tuple[int, int], length: int
) -> jax.Array:
    """Returns `log a` of the steps whose gates do not decide it, else FREE: `[B, length]` float32.

    A reset has a = 2^-200 = 0 and thereby m = 1; a step held has a = 1 and thereby m = 0.

    Args:
      reset, valid: `[B or 1, L]`.
      shape: (B, L).
      length: at least L; steps beyond are held.
    """
    forced = jnp.where(reset, RESET, FREE)
    if valid is not None:
        forced = jnp.where(valid, forced, HOLD)
    forced = jnp.broadcast_to(forced, shape).astype(jnp.float32)
    return jnp.pad(forced, ((0, 0), (0, length - shape[1])), constant_values=HOLD)


def rates(a_param: jax.Array) -> jax.Array:
    """Returns `-log a` at r = 1, `[E]` float32."""
    return DECAY_EXPONENT / _LN2 * jax.nn.softplus(a_param.astype(jnp.float32))


def d_a_param(a_param: jax.Array, d_rates: jax.Array) -> jax.Array:
    """Returns Lambda's gradient from that of `rates`, which comes in parts `[..., E]`."""
    total = jnp.sum(d_rates, axis=tuple(range(d_rates.ndim - 1)))
    slope = DECAY_EXPONENT / _LN2 * jax.nn.sigmoid(a_param.astype(jnp.float32))
    return (total * slope).astype(a_param.dtype)


@dataclasses.dataclass(frozen=True)
class Gates:
    """One step's gates, for blocks of any shape that broadcast.

    Attributes:
      rate: of `rates`.
      forced: of `forced_log_decay`.
      reciprocal: of numbers in [1, 1e35].
    """

    rate: jax.Array
    forced: jax.Array
    reciprocal: Callable[[jax.Array], jax.Array]

    def decay(self, gate_a: jax.Array) -> jax.Array:
        """Returns `a_t`."""
        return jnp.exp2(self._log_decay(self._sigmoid(gate_a)))

    def decay_and_input(
        self, v: jax.Array, gate_x: jax.Array, gate_a: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `a_t` and `m_t i_t v_t`."""
        log_a = self._log_decay(self._sigmoid(gate_a))
        a = jnp.exp2(log_a)
        square, inverse = self._multiplier(a, log_a)
        x = square * inverse * self._sigmoid(gate_x) * v
        return a, jnp.where(self.forced == HOLD, 0.0, x)

    def gradients(
        self, g: jax.Array, before: jax.Array, v: jax.Array, gate_x: jax.Array, gate_a: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns `(dv, d_gate_x, d_gate_a, d_rate)`.

        Args:
          g: gradient with respect to `h_t`.
          before: `h_{t-1}`.
          v, gate_x, gate_a: as in the forward direction.
        """
        i, r = self._sigmoid(gate_x), self._sigmoid(gate_a)
        log_a = self._log_decay(r)
        a = jnp.exp2(log_a)
        square, inverse = self._multiplier(a, log_a)
        dv = g * (square * inverse) * i
        # dm = -a^2 / m dlog_a, where 1 / m is twice the square root's slope, which is bounded.
        slope = a * jnp.minimum(inverse, 2.0 * MAX_SQRT_SLOPE)
        d_log_a = _LN2 * g * a * (before - slope * i * v)
        d_rate = jnp.where(self.forced == FREE, -r * d_log_a, 0.0)
        return dv, dv * v * (1.0 - i), self.rate * (1.0 - r) * d_rate, d_rate

    def _sigmoid(self, x: jax.Array) -> jax.Array:
        return self.reciprocal(1.0 + jnp.exp2(jnp.minimum(x * (-1.0 / _LN2), 115.0)))

    def _log_decay(self, r: jax.Array) -> jax.Array:
        return jnp.where(self.forced == FREE, -self.rate * r, self.forced)

    def _multiplier(self, a: jax.Array, log_a: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns `m^2 = 1 - a^2`, to float32's precision for every a, and `1 / m`."""
        # Where 1 - a * a would cancel: four terms of 1 - exp(-y), 1.3e-7 off at y = 1/16.
        y = -2.0 * _LN2 * log_a
        series = y * (1.0 - y * (1.0 / 2 - y * (1.0 / 6 - y * (1.0 / 24))))
        square = jnp.where(y < 1.0 / 16, series, 1.0 - a * a)
        return square, jax.lax.rsqrt(jnp.maximum(square, 1e-30))
