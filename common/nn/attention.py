"""Causal self-attention with a ring of cached keys: global or over a sliding window."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels import attention
from common.nn.layout import TokenLayout
from common.nn.linear import Linear
from common.nn.param import Initializer
from common.nn.rope import rope
from common.sharding import shard

# Finite, so that a row with nothing to attend to stays free of NaN.
MASKED = -2.3819763e38


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """Ring of the last R keys and values; position p of a document lies in slot p mod R.

    Attributes:
      keys: `[B, R, K, h]`, already rotated, in the compute dtype.
      values: `[B, R, K, h]`.
    """

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Multi-head attention with grouped keys, rotary positions and an optional window.

    Args:
      width: D.
      num_heads: N query heads.
      num_kv_heads: K key and value heads; N is a multiple of K.
      head_dim: h.
      window: number of keys a query sees, its own included; None sees the whole document.
      rope_base, rope_fraction: see `rope`.
      softcap: cap c of `c tanh(logits / c)`, or None.
      out_bias: whether the output projection has a bias.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        rope_base: float = 10_000.0,
        rope_fraction: float = 1.0,
        softcap: float | None = None,
        out_bias: bool = False,
        out_init: Initializer | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        cols = {"dtype": dtype, "rngs": rngs}
        self.q = Linear(width, num_heads * head_dim, axes=("embed", "heads"), **cols)
        self.k = Linear(width, num_kv_heads * head_dim, axes=("embed", "kv_heads"), **cols)
        self.v = Linear(width, num_kv_heads * head_dim, axes=("embed", "kv_heads"), **cols)
        self.o = Linear(
            num_heads * head_dim,
            width,
            axes=("heads", "embed"),
            use_bias=out_bias,
            init=out_init,
            **cols,
        )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window = window
        self.rope_base, self.rope_fraction = rope_base, rope_fraction
        self.softcap = softcap
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: jax.Array, layout: TokenLayout, state: AttentionState | None = None
    ) -> tuple[jax.Array, AttentionState | None]:
        """`x [B, T, D] -> [B, T, D]` and the ring after the last real token (None if none came)."""
        batch, length, _ = x.shape
        q = self._heads(self.q(x), self.num_heads, layout)
        k = self._heads(self.k(x), self.num_kv_heads, layout)
        v = self.v(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        q = shard(q, "batch", "seq", "heads", None)
        if state is None or layout.fresh:
            out = attention(
                q,
                k,
                v,
                causal=True,
                window=self.window,
                softcap=self.softcap,
                segment_ids=layout.segments,
            )
        elif length == 1:
            out = self._attend_one(q, k, v, layout, state)
        else:
            out = self._attend_chunk(q, k, v, layout, state)
        y = self.o(out.reshape(batch, length, -1))
        return y, None if state is None else _write(state, k, v, layout)

    def init_state(self, batch: int, capacity: int | None) -> AttentionState:
        """An empty ring for documents of at most `capacity` tokens (None: any, given a window).

        A window of W keys needs W - 1 slots: the query brings its own key.
        """
        limits = [n for n in (capacity, self.window and self.window - 1) if n is not None]
        if not limits:
            raise ValueError("attention without a window needs a cache capacity")
        shape = (batch, max(1, min(limits)), self.num_kv_heads, self.head_dim)
        return AttentionState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def _heads(self, x: jax.Array, heads: int, layout: TokenLayout) -> jax.Array:
        x = x.reshape(*x.shape[:2], heads, self.head_dim)
        return rope(x, layout.positions, base=self.rope_base, fraction=self.rope_fraction)

    def _attend_one(self, q, k, v, layout: TokenLayout, state: AttentionState) -> jax.Array:
        """One query a row against the ring and its own key, without moving the ring."""
        batch, slots = state.keys.shape[:2]
        group = self.num_heads // self.num_kv_heads
        q = q.reshape(batch, self.num_kv_heads, group, self.head_dim)
        position = layout.positions[:, :1]
        cached, first, segments = _continued(layout)
        held = _held_positions(cached, slots)  # [B, R]
        allowed = (held >= first[:, None]) & (segments[:, :1] == 0)
        if self.window is not None:
            allowed &= held > position - self.window
        keys, values = state.keys.astype(self.dtype), state.values.astype(self.dtype)
        wide = {"preferred_element_type": jnp.float32}
        # The ring as the left operand is read as it lies; as the right one it would be transposed.
        old = jnp.swapaxes(jnp.einsum("brkh,bkgh->bkrg", keys, q, **wide), 2, 3)
        own = jnp.einsum("bkgh,bkh->bkg", q, k[:, 0], **wide)[..., None]
        logits = jnp.concatenate([old, own], axis=-1) * self.head_dim**-0.5
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        allowed = jnp.pad(allowed, ((0, 0), (0, 1)), constant_values=True)
        weights = jax.nn.softmax(jnp.where(allowed[:, None, None], logits, MASKED), axis=-1)
        weights = weights.astype(self.dtype)
        out = jnp.einsum("bkgr,brkh->bkgh", weights[..., :-1], values, **wide)
        out = out + weights[..., -1:].astype(jnp.float32) * v[:, 0, :, None].astype(jnp.float32)
        return out.astype(self.dtype)

    def _attend_chunk(self, q, k, v, layout: TokenLayout, state: AttentionState) -> jax.Array:
        """A chunk of queries against the ring, unrolled oldest first, and the chunk itself."""
        slots = state.keys.shape[1]
        cached, first, segments = _continued(layout)
        order = (cached[:, None] + jnp.arange(slots)[None]) % slots  # [B, R]
        held = cached[:, None] - slots + jnp.arange(slots)[None]
        owner = jnp.where(held >= first[:, None], 0, -1)
        old_k = jnp.take_along_axis(state.keys, order[..., None, None], axis=1)
        old_v = jnp.take_along_axis(state.values, order[..., None, None], axis=1)
        return attention(
            q,
            jnp.concatenate([old_k.astype(k.dtype), k], axis=1),
            jnp.concatenate([old_v.astype(v.dtype), v], axis=1),
            causal=True,
            window=self.window,
            softcap=self.softcap,
            segment_ids=(segments, jnp.concatenate([owner, segments], axis=1)),
        )


def _continued(layout: TokenLayout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(cached, first, segments)` of a layout that continues a cache."""
    if layout.cached is None or layout.first is None or layout.segments is None:
        raise ValueError("a cache was given, but the layout is one of whole sequences")
    return layout.cached, layout.first, layout.segments


def _held_positions(cached: jax.Array, slots: int) -> jax.Array:
    """`[B, R]`: the position each slot holds when `cached [B]` tokens came; negative if none."""
    slot = jnp.arange(slots)[None]
    newest = cached[:, None] - 1
    return newest - (newest - slot) % slots


def _write(
    state: AttentionState, k: jax.Array, v: jax.Array, layout: TokenLayout
) -> AttentionState:
    """The ring after the chunk: a slot takes the last document's newest token that maps to it."""
    slots, length = state.keys.shape[1], k.shape[1]
    if length == 1 and layout.lengths is None:
        row = jnp.arange(k.shape[0])
        slot = layout.positions[:, 0] % slots
        keys = state.keys.at[row, slot].set(k[:, 0].astype(state.keys.dtype))
        values = state.values.at[row, slot].set(v[:, 0].astype(state.values.dtype))
        return AttentionState(keys, values)
    cached, _, _ = _continued(layout)
    lengths = jnp.full_like(cached, length) if layout.lengths is None else layout.lengths
    last = jnp.clip(lengths - 1, 0)[:, None]  # [B, 1]
    newest = jnp.take_along_axis(layout.positions, last, axis=1)
    held = newest - (newest - jnp.arange(slots)[None]) % slots  # [B, R]
    source = last - (newest - held)  # index in the chunk of the token with that position
    taken = (source >= 0) & (lengths[:, None] > 0)
    source = jnp.clip(source, 0)[..., None, None]
    pick = taken[..., None, None]
    keys = jnp.where(pick, jnp.take_along_axis(k, source, axis=1), state.keys)
    values = jnp.where(pick, jnp.take_along_axis(v, source, axis=1), state.values)
    return AttentionState(keys.astype(state.keys.dtype), values.astype(state.values.dtype))
