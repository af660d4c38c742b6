"""Self-attention, causal with a ring of cached keys or bidirectional: global or over a window."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels import attention, decode_attention
from common.nn.layout import TokenLayout
from common.nn.linear import Linear
from common.nn.norms import RMSNorm
from common.nn.param import Initializer
from common.nn.rope import RopeScaling, rope
from common.sharding import per_shard, shard, ways

# Logical axes of queries `[B, T, K, N / K, h]`, keys `[B, S, K, h]`, cached keys `[B, K, R, h]`.
QUERIES = ("batch", "seq", "kv_heads", None, None)
KEYS = ("batch", None, "kv_heads", None)
CACHED = ("batch", "kv_heads", None, None)
_TILE, _SMALL = 16, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """Ring of the last R keys and values; position p of a document lies in slot p mod R.

    Attributes:
      keys: `[B, K, R, h]`, already rotated, in the compute dtype.
      values: `[B, K, R, h]`.
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
      causal: whether a query sees no later key. Without, there is no decode cache.
      window: causal: number of keys a query sees, its own included; bidirectional: number of keys
        on each side of its own. A pair is the exact number of keys before and after its own. None
        sees the whole document.
      rope_base, rope_fraction, rope_scaling: see `rope`.
      query_scale: factor of the scores; None is `h ** -0.5`.
      softcap: cap c of `c tanh(logits / c)`, or None.
      qk_norm: RMSNorm over h on queries and keys, before they are rotated (Gemma 3).
      norm_epsilon, zero_centred_norm: of these norms.
      qkv_bias, out_bias: whether the input projections and the output projection have biases.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = True,
        window: int | tuple[int, int] | None = None,
        rope_base: float = 10_000.0,
        rope_fraction: float = 1.0,
        rope_scaling: RopeScaling | None = None,
        query_scale: float | None = None,
        softcap: float | None = None,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        zero_centred_norm: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        out_init: Initializer | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        cols = {"dtype": dtype, "rngs": rngs}
        inward = {"use_bias": qkv_bias, **cols}
        self.q = Linear(width, num_heads * head_dim, axes=("embed", "heads"), **inward)
        self.k = Linear(width, num_kv_heads * head_dim, axes=("embed", "kv_heads"), **inward)
        self.v = Linear(width, num_kv_heads * head_dim, axes=("embed", "kv_heads"), **inward)
        self.o = Linear(
            num_heads * head_dim,
            width,
            axes=("heads", "embed"),
            use_bias=out_bias,
            init=out_init,
            **cols,
        )
        norm = {"epsilon": norm_epsilon, "zero_centred": zero_centred_norm, "rngs": rngs}
        self.q_norm = RMSNorm(head_dim, **norm) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, **norm) if qk_norm else None
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.causal = causal
        # Keys before and after the query's own position; None: all.
        self.before, self.after = _bounds(causal, window)
        self.rope_base, self.rope_fraction = rope_base, rope_fraction
        self.rope_scaling = rope_scaling
        self.query_scale = query_scale
        self.softcap = softcap
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: jax.Array, layout: TokenLayout, state: AttentionState | None = None
    ) -> tuple[jax.Array, AttentionState | None]:
        """`x [B, T, D] -> [B, T, D]` and the ring after the last real token (None if none came)."""
        if state is not None and not self.causal:
            raise ValueError("bidirectional attention has no decode cache")
        batch, length, _ = x.shape
        q = self._rotated(self._heads(self.q(x), "heads"), self.q_norm, layout)
        k = self._rotated(self._heads(self.k(x), "kv_heads"), self.k_norm, layout)
        v = self._heads(self.v(x), "kv_heads")
        if state is None or layout.fresh:
            out = self._attend(q, k, v, layout.segments, layout.segments)
        elif length == 1:
            out = self._attend_one(q, k, v, layout, state)
        else:
            out = self._attend_chunk(q, k, v, layout, state)
        y = self.o(out.reshape(batch, length, -1))
        return y, None if state is None else _write(state, k, v, layout)

    def init_state(self, batch: int, capacity: int | None) -> AttentionState:
        """An empty ring for documents of at most `capacity` tokens (None: any, given a window).

        A window of W keys needs W - 1 slots: the query brings its own key. Large rings get up to 15
        more, so that their number is a multiple of 16.
        """
        if not self.causal:
            raise ValueError("bidirectional attention has no decode cache")
        limits = [n for n in (capacity, self.before) if n is not None]
        if not limits:
            raise ValueError("attention without a window needs a cache capacity")
        slots = whole_tiles(max(1, min(limits)))
        shape = (batch, self.num_kv_heads, slots, self.head_dim)
        return AttentionState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def _heads(self, x: jax.Array, axis: str) -> jax.Array:
        # Constrained here, lest a head be split over devices where whole heads do not divide.
        return shard(x.reshape(*x.shape[:2], -1, self.head_dim), "batch", "seq", axis, None)

    def _rotated(self, x: jax.Array, norm: RMSNorm | None, layout: TokenLayout) -> jax.Array:
        x = x if norm is None else norm(x)
        return rope(
            x,
            layout.positions,
            base=self.rope_base,
            fraction=self.rope_fraction,
            scaling=self.rope_scaling,
        )

    def _attend(self, q, k, v, query_segments, key_segments) -> jax.Array:
        """Attention, its queries split over `context`, each device with all of its keys."""
        total, keys = q.shape[1], k.shape[1]
        window: int | tuple[int, int] | None = None
        if self.causal:
            window = None if self.before is None else self.before + 1
        elif self.before is not None and self.after is not None:
            window = (self.before, self.after)

        def local(q, k, v, query_segments, key_segments, *, axis_name: str | None) -> jax.Array:
            segments = None if query_segments is None else (query_segments, key_segments)
            offset = None
            if axis_name is not None:
                offset = keys - total + q.shape[1] * jax.lax.axis_index(axis_name)
            out = attention(
                q.reshape(*q.shape[:2], -1, self.head_dim),
                k,
                v,
                causal=self.causal,
                window=window,
                softcap=self.softcap,
                scale=self.query_scale,
                segment_ids=segments,
                offset=offset,
            )
            return out.reshape(q.shape)

        out = per_shard(
            local,
            (*grouped_heads(q, k, v), query_segments, key_segments),
            (QUERIES, KEYS, KEYS, QUERIES[:2], KEYS[:2]),
            QUERIES,
            sequence="seq",
        )
        return out.reshape(q.shape)

    def _attend_one(self, q, k, v, layout: TokenLayout, state: AttentionState) -> jax.Array:
        """One query a row against the ring and its own key, without moving the ring."""
        cached, starts, segments = _continued(layout)
        if self.before is not None:
            starts = jnp.maximum(starts, layout.positions[:, 0] - self.before)
        starts = jnp.where(segments[:, 0] == 0, starts, cached)  # A new document sees no old one.

        def local(q, k, v, keys, values, cached, starts) -> jax.Array:
            out = decode_attention(
                q.reshape(*q.shape[:2], -1, self.head_dim),
                keys,
                values,
                cached,
                new=(k, v),
                starts=starts,
                softcap=self.softcap,
                scale=self.query_scale,
            )
            return out.reshape(q.shape)

        query, row = ("batch", None, *QUERIES[2:]), ("batch",)
        keys, values = state.keys.astype(self.dtype), state.values.astype(self.dtype)
        out = per_shard(
            local,
            (*grouped_heads(q, k, v, cached=(keys, values)), cached, starts),
            (query, KEYS, KEYS, CACHED, CACHED, row, row),
            query,
        )
        return out.reshape(q.shape)

    def _attend_chunk(self, q, k, v, layout: TokenLayout, state: AttentionState) -> jax.Array:
        """A chunk of queries against the ring, unrolled oldest first, and the chunk itself."""
        slots = state.keys.shape[2]
        cached, first, segments = _continued(layout)
        order = (cached[:, None] + jnp.arange(slots)[None]) % slots  # [B, R]
        held = cached[:, None] - slots + jnp.arange(slots)[None]
        owner = jnp.where(held >= first[:, None], 0, -1)

        def behind(ring: jax.Array, own: jax.Array) -> jax.Array:
            old = jnp.take_along_axis(ring, order[:, None, :, None], axis=2)
            return jnp.concatenate([jnp.swapaxes(old, 1, 2).astype(own.dtype), own], axis=1)

        keys, values = behind(state.keys, k), behind(state.values, v)
        return self._attend(q, keys, values, segments, jnp.concatenate([owner, segments], axis=1))


def whole_tiles(slots: int) -> int:
    """Returns how many slots to keep for at least so many keys.

    A TPU keeps cached keys in the order in which its kernel reads them if their slots fill whole
    tiles; others would be copied before every token. Small caches are not worth it.
    """
    return slots + -slots % _TILE if slots > _SMALL else slots


def grouped_heads(
    q: jax.Array, *keys: jax.Array, cached: tuple[jax.Array, ...] = ()
) -> tuple[jax.Array, ...]:
    """`q [B, T, N, h]` -> `[B, T, K, N / K, h]`, and what is to lie with it.

    That is keys and values `[B, S, K, h]` of the sequence, then `cached` ones `[B, K, R, h]`.
    Where a mesh cuts the queries' heads finer than there are key heads, K counts copies too,
    one for each device that needs it: no device then holds more than it works on.
    """
    kv_heads = keys[0].shape[2] if keys else cached[0].shape[1]
    parts = ways("kv_heads")
    copies = parts // math.gcd(parts, kv_heads)
    if q.shape[2] // kv_heads % copies:
        copies = 1
    placed = [(x, 2) for x in keys] + [(x, 1) for x in cached]
    repeated = [jnp.repeat(x, copies, axis=axis) if copies > 1 else x for x, axis in placed]
    return q.reshape(*q.shape[:2], kv_heads * copies, -1, q.shape[-1]), *repeated


def _bounds(causal: bool, window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own position a query sees; None: all."""
    if isinstance(window, int):
        before, after = (window - 1, 0) if causal else (window, window)
    elif window is not None:
        before, after = window[0], 0 if causal else window[1]
    else:
        return None, 0 if causal else None
    if before < 0 or after < 0:
        raise ValueError(f"attention needs a window that holds the query's own key, not {window}")
    return before, after


def _continued(layout: TokenLayout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(cached, first, segments)` of a layout that continues a cache."""
    if layout.cached is None or layout.first is None or layout.segments is None:
        raise ValueError("a cache was given, but the layout is one of whole sequences")
    return layout.cached, layout.first, layout.segments


def _write(
    state: AttentionState, k: jax.Array, v: jax.Array, layout: TokenLayout
) -> AttentionState:
    """The ring after the chunk: a slot takes the last document's newest token that maps to it."""
    slots, length = state.keys.shape[2], k.shape[1]
    if length == 1 and layout.lengths is None:
        # One by one, lest the compiler turn the ring so that a slot's heads lie together.
        row, head = jnp.arange(k.shape[0])[:, None], jnp.arange(k.shape[2])[None]
        at = (row, head, layout.positions % slots)
        keys = state.keys.at[at].set(k[:, 0].astype(state.keys.dtype))
        values = state.values.at[at].set(v[:, 0].astype(state.values.dtype))
        return AttentionState(keys, values)
    cached, _, _ = _continued(layout)
    lengths = jnp.full_like(cached, length) if layout.lengths is None else layout.lengths
    last = jnp.clip(lengths - 1, 0)[:, None]  # [B, 1]
    newest = jnp.take_along_axis(layout.positions, last, axis=1)
    held = newest - (newest - jnp.arange(slots)[None]) % slots  # [B, R]
    source = last - (newest - held)  # index in the chunk of the token with that position
    taken = (source >= 0) & (lengths[:, None] > 0)
    source = jnp.clip(source, 0)[..., None, None]

    def written(ring: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.swapaxes(jnp.take_along_axis(new, source, axis=1), 1, 2)
        return jnp.where(taken[:, None, :, None], new.astype(ring.dtype), ring)

    return AttentionState(written(state.keys, k), written(state.values, v))
