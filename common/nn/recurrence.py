"""The Real-Gated Linear Recurrent Unit, its short convolution, their block (Griffin, 2.3-2.4)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels import linear_scan, rg_lru
from common.kernels.rg_lru.gates import coefficients
from common.nn.layout import TokenLayout
from common.nn.linear import BlockDiagonalLinear, Linear
from common.nn.mlp import gelu_tanh
from common.nn.param import Initializer, fan_in_normal, param, zeros
from common.sharding import per_shard, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """What a recurrent block carries from token to token, whatever the length of the text.

    Attributes:
      h: `[B, E]` fp32 hidden state.
      conv: `[B, K-1, E]` last inputs of the convolution, oldest first, in the compute dtype.
    """

    h: jax.Array
    conv: jax.Array


def decay_init(low: float = 0.9, high: float = 0.999) -> Initializer:
    """Lambda with which the base decay a = exp(-softplus(Lambda)) has a^2 uniform in its range."""

    def init(key, shape, dtype=jnp.float32):
        square = jax.random.uniform(key, shape, jnp.float32) * (high**2 - low**2) + low**2 + 1e-8
        return jnp.log(jnp.expm1(-0.5 * jnp.log(square))).astype(dtype)

    return init


class CausalConv1D(nnx.Module):
    """Depthwise convolution over time that stops at document borders: `w [K, E]`, `b [E]`.

    `w[K-1]` multiplies the current token, `w[0]` the oldest.
    """

    def __init__(
        self,
        width: int,
        *,
        taps: int = 4,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.w = param(rngs, fan_in_normal(0.01), (taps, width), (None, "lru"))
        self.b = param(rngs, zeros, (width,), ("lru",))
        self.taps = taps
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, z: jax.Array, layout: TokenLayout, tail: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolves `z [B, T, E]` after the inputs `tail [B, K-1, E]` (None: nothing before).

        Returns the result `[B, T, E]` and the new tail (None if none was given).
        """
        length, reach = z.shape[1], self.taps - 1
        before = jnp.zeros_like(z[:, :reach]) if tail is None else tail.astype(z.dtype)
        if before.shape[1] < reach:
            before = jnp.pad(before, ((0, 0), (reach - before.shape[1], 0), (0, 0)))
        history = jnp.concatenate([before, z], axis=1)  # [B, K-1+T, E]
        segments = layout.segments
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (reach, 0)))  # the tail is document 0
        w = self.w[...].astype(self.dtype)
        y = z.astype(self.dtype) * w[reach]
        for s in range(1, self.taps):
            past = history[:, reach - s : reach - s + length].astype(self.dtype)
            if segments is not None:
                same = segments[:, reach - s : reach - s + length] == segments[:, reach:]
                past = jnp.where(same[..., None], past, 0)
            y = y + past * w[reach - s]
        y = y + self.b[...].astype(self.dtype)
        return y, None if tail is None else self._new_tail(history, segments, layout)

    def _new_tail(
        self, history: jax.Array, segments: jax.Array | None, layout: TokenLayout
    ) -> jax.Array:
        """The last K-1 real inputs of each row, those of earlier documents replaced by zeros.

        Clearing them matters when the last document has fewer than K-1 tokens so far.
        """
        reach = self.taps - 1
        assert segments is not None
        if layout.lengths is None:
            tail, owner = history[:, -reach:], segments[:, -reach:]
            current = segments[:, -1:]
        else:
            index = layout.lengths[:, None] + jnp.arange(reach)[None]  # [B, K-1]
            tail = jnp.take_along_axis(history, index[..., None], axis=1)
            owner = jnp.take_along_axis(segments, index, axis=1)
            current = owner[:, -1:]
        return jnp.where((owner == current)[..., None], tail, 0)


class RGLRU(nnx.Module):
    """Real-Gated Linear Recurrent Unit (Griffin, eq. 1-4).

    With v_t the input: r_t, i_t = sigmoid of block-diagonal maps of v_t,
    `log a_t = -8 r_t softplus(Lambda)` and `h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t v_t`. A
    document starts with `h = i v`, undamped.

    Attributes:
      a_param: Lambda `[E]`, of the opposite sign to the paper's: a = exp(-softplus(Lambda)).
    """

    def __init__(
        self,
        width: int,
        num_blocks: int,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        reference_precision: bool = False,
        rngs: nnx.Rngs,
    ):
        self.a_param = param(rngs, decay_init(), (width,), ("lru",))
        self.input_gate = BlockDiagonalLinear(width, num_blocks, dtype=dtype, rngs=rngs)
        self.a_gate = BlockDiagonalLinear(width, num_blocks, dtype=dtype, rngs=rngs)
        self.dtype = jnp.dtype(dtype)
        self.reference_precision = reference_precision
        # bfloat16 rounds a decay of .999 to 1; only the published code's bf16 numbers want that.
        self.gate_dtype = self.dtype if reference_precision else jnp.dtype(jnp.float32)

    def __call__(
        self, v: jax.Array, layout: TokenLayout, h0: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """`v [B, T, E]`, `h0 [B, E]` fp32 or None -> outputs `[B, T, E]`, last state fp32."""
        # No coarser than the products that they come from; what follows is computed in fp32.
        gate_x, gate_a = (gate(v).astype(self.dtype) for gate in (self.input_gate, self.a_gate))
        inputs = v, gate_x, gate_a, self.a_param[...], layout.resets, layout.valid
        if h0 is not None and v.shape[1] == 1:
            a, x = coefficients(*inputs, self.gate_dtype)
            h = a[:, 0] * h0 + x[:, 0]
            return h[:, None].astype(self.dtype), h
        seq = None if self.reference_precision else "seq"
        wide = ("batch", seq, "lru")
        masks = (self._mask_axes(mask, len(v), seq) for mask in (layout.resets, layout.valid))
        return per_shard(
            self._recurrence,
            (*inputs, h0),
            (wide, wide, wide, ("lru",), *masks, ("batch", "lru")),
            (wide, ("batch", "lru")),
            sequence=seq,
        )

    def _mask_axes(
        self, mask: jax.Array | None, batch: int, seq: str | None
    ) -> tuple[str | None, str | None] | None:
        return None if mask is None else ("batch" if len(mask) == batch else None, seq)

    def _recurrence(
        self,
        v: jax.Array,
        gate_x: jax.Array,
        gate_a: jax.Array,
        a_param: jax.Array,
        reset: jax.Array,
        valid: jax.Array | None,
        h0: jax.Array | None,
        *,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The recurrence on one device's shard, whose time lies over `axis_name`, if any."""
        if not self.reference_precision:
            masks = {"reset": reset, "valid": valid}
            return rg_lru(v, gate_x, gate_a, a_param, h0, **masks, axis_name=axis_name)
        a, x = coefficients(v, gate_x, gate_a, a_param, reset, valid, self.gate_dtype)
        h, h_last = linear_scan(a, x, h0)
        return h.astype(v.dtype), h_last


class RecurrentBlock(nnx.Module):
    """Griffin's recurrent block: `(RGLRU(conv(x Wx)) * gelu(x Wy)) Wo` (Griffin, section 2.3)."""

    def __init__(
        self,
        width: int,
        lru_width: int,
        num_gate_blocks: int,
        *,
        conv_taps: int = 4,
        out_init: Initializer | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        reference_precision: bool = False,
        rngs: nnx.Rngs,
    ):
        inward = {"axes": ("embed", "lru"), "use_bias": True, "dtype": dtype, "rngs": rngs}
        self.linear_x = Linear(width, lru_width, **inward)
        self.linear_y = Linear(width, lru_width, **inward)
        self.conv = CausalConv1D(lru_width, taps=conv_taps, dtype=dtype, rngs=rngs)
        self.rg_lru = RGLRU(
            lru_width,
            num_gate_blocks,
            dtype=dtype,
            reference_precision=reference_precision,
            rngs=rngs,
        )
        self.linear_out = Linear(
            lru_width,
            width,
            axes=("lru", "embed"),
            use_bias=True,
            init=out_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.lru_width = lru_width
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: jax.Array, layout: TokenLayout, state: RecurrentState | None = None
    ) -> tuple[jax.Array, RecurrentState | None]:
        """`x [B, T, D] -> [B, T, D]` and the state after the last real token; None if none came."""
        y = gelu_tanh(self.linear_y(x).astype(jnp.float32)).astype(self.dtype)
        z = shard(self.linear_x(x), "batch", "seq", "lru")
        u, tail = self.conv(z, layout, None if state is None else state.conv)
        u, h = self.rg_lru(u, layout, None if state is None else state.h)
        out = self.linear_out(shard(u * y, "batch", "seq", "lru"))
        if state is None or tail is None:
            return out, None
        return out, RecurrentState(h=h, conv=tail.astype(state.conv.dtype))

    def init_state(self, batch: int) -> RecurrentState:
        """The state before the first token."""
        return RecurrentState(
            h=jnp.zeros((batch, self.lru_width), jnp.float32),
            conv=jnp.zeros((batch, self.conv.taps - 1, self.lru_width), self.dtype),
        )
