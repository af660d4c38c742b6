"""Cross attention: queries of one sequence over the states of another, of a width of its own."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels import attention, decode_attention
from common.nn.attention import CACHED, KEYS, QUERIES, grouped_heads, whole_tiles
from common.nn.linear import Linear
from common.nn.norms import RMSNorm
from common.nn.param import Initializer
from common.sharding import per_shard, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossKeys:
    """What one layer needs of the other sequence to decode: computed once, never written again.

    Attributes:
      keys: `[B, K, S, h]` in the compute dtype.
      values: `[B, K, S, h]`.
      lengths: `[B]` int32 number of real tokens at the head of each row; the rest is padding.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossStates:
    """The other sequence as whole sequences are trained on: its states, and who may see them.

    Attributes:
      states: `[B, S, De]`. In fp32 their gradient adds up in fp32 over the layers that share them,
        whatever these compute in.
      segments: `[B, S]` int32; a query sees the states of its own segment.
      query_segments: `[B, T]` int32. A query whose segment does not occur sees nothing and gets 0.
    """

    states: jax.Array
    segments: jax.Array
    query_segments: jax.Array


class CrossAttention(nnx.Module):
    """Multi-head attention with grouped keys over another sequence, without positions.

    Args:
      width: D of the queries and of the result.
      memory_width: De of the states that keys and values are made of.
      num_heads: N query heads.
      num_kv_heads: K key and value heads; N is a multiple of K.
      head_dim: h.
      query_scale: factor of the scores; None is `h ** -0.5`.
      softcap: cap c of `c tanh(score / c)`, or None.
      qk_norm: RMSNorm over h on queries and keys.
      norm_epsilon, zero_centred_norm: of these norms.
      qkv_bias: whether the input projections have biases.
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        query_scale: float | None = None,
        softcap: float | None = None,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        zero_centred_norm: bool = True,
        qkv_bias: bool = False,
        out_init: Initializer | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inward = {"use_bias": qkv_bias, "dtype": dtype, "rngs": rngs}
        kv_width = num_kv_heads * head_dim
        self.q = Linear(width, num_heads * head_dim, axes=("embed", "heads"), **inward)
        self.k = Linear(memory_width, kv_width, axes=("embed", "kv_heads"), **inward)
        self.v = Linear(memory_width, kv_width, axes=("embed", "kv_heads"), **inward)
        self.o = Linear(
            num_heads * head_dim,
            width,
            axes=("heads", "embed"),
            init=out_init,
            dtype=dtype,
            rngs=rngs,
        )
        norm = {"epsilon": norm_epsilon, "zero_centred": zero_centred_norm, "rngs": rngs}
        self.q_norm = RMSNorm(head_dim, **norm) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, **norm) if qk_norm else None
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.query_scale, self.softcap = query_scale, softcap
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array, memory: CrossStates | CrossKeys) -> jax.Array:
        """`x [B, T, D] -> [B, T, D]`.

        Beside `CrossKeys` of B rows, `x` may have n B rows: n in a row read the same keys, which
        are not copied (beams).
        """
        q = self._heads(self.q(x), "heads")
        q = q if self.q_norm is None else self.q_norm(q)
        if isinstance(memory, CrossStates):
            keys, values = self._keys(memory.states)
            out = self._attend(q, keys, values, memory.query_segments, memory.segments)
        elif x.shape[1] == 1:
            out = self._attend_one(q, memory)
        else:
            out = self._attend_chunk(q, memory)
        return self.o(out.reshape(*x.shape[:2], -1))

    def keys(self, states: jax.Array, lengths: jax.Array) -> CrossKeys:
        """What decoding needs of `states [B, S, De]`, whose rows have `lengths [B]` real ones."""
        length = states.shape[1]
        padding = ((0, 0), (0, 0), (0, whole_tiles(length) - length), (0, 0))
        keys, values = (jnp.pad(jnp.swapaxes(x, 1, 2), padding) for x in self._keys(states))
        return CrossKeys(keys, values, lengths)

    def _keys(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = self._heads(self.k(states), "kv_heads")
        keys = keys if self.k_norm is None else self.k_norm(keys)
        return keys, self._heads(self.v(states), "kv_heads")

    def _heads(self, x: jax.Array, axis: str) -> jax.Array:
        return shard(x.reshape(*x.shape[:2], -1, self.head_dim), "batch", "seq", axis, None)

    def _attend(self, q, keys, values, query_segments, segments) -> jax.Array:
        """Whole sequences: queries split over `context`, each device with all of its keys."""

        def local(q, keys, values, query_segments, segments) -> jax.Array:
            out = attention(
                q.reshape(*q.shape[:2], -1, self.head_dim),
                keys,
                values,
                softcap=self.softcap,
                scale=self.query_scale,
                segment_ids=(query_segments, segments),
            )
            return out.reshape(q.shape)

        out = per_shard(
            local,
            (*grouped_heads(q, keys, values), query_segments, segments),
            (QUERIES, KEYS, KEYS, QUERIES[:2], KEYS[:2]),
            QUERIES,
        )
        return out.reshape(q.shape)

    def _attend_chunk(self, q: jax.Array, memory: CrossKeys) -> jax.Array:
        """Several queries a row over cached keys. Queries are a set: n rows of T are one of n T."""
        batch, _, length, _ = memory.keys.shape
        together = q.reshape(batch, -1, *q.shape[2:])
        seen = jnp.arange(length)[None] < memory.lengths[:, None]
        own = jnp.zeros(together.shape[:2], jnp.int32)
        keys, values = (
            jnp.swapaxes(x.astype(self.dtype), 1, 2) for x in (memory.keys, memory.values)
        )
        out = self._attend(together, keys, values, own, jnp.where(seen, 0, -1))
        return out.reshape(q.shape)

    def _attend_one(self, q: jax.Array, memory: CrossKeys) -> jax.Array:
        """One query a row over cached keys; rows that share keys count as more heads of a group."""
        batch = memory.keys.shape[0]
        keys, values = memory.keys.astype(self.dtype), memory.values.astype(self.dtype)
        # [n B, 1, K, G, h]
        grouped, keys, values = grouped_heads(q, cached=(keys, values))
        beams = q.shape[0] // batch
        kv_heads, group = grouped.shape[2:4]
        folded = grouped.reshape(batch, beams, kv_heads, group, self.head_dim)
        folded = jnp.swapaxes(folded, 1, 2).reshape(batch, 1, kv_heads, -1, self.head_dim)

        def local(q, keys, values, lengths) -> jax.Array:
            # The query stands at the last key, so that it sees all of the row's.
            out = decode_attention(
                q.reshape(*q.shape[:2], -1, self.head_dim),
                keys,
                values,
                lengths,
                softcap=self.softcap,
                scale=self.query_scale,
            )
            return out.reshape(q.shape)

        query = ("batch", None, *QUERIES[2:])
        out = per_shard(
            local,
            (folded, keys, values, memory.lengths),
            (query, CACHED, CACHED, ("batch",)),
            query,
        )
        out = out.reshape(batch, kv_heads, beams, group, self.head_dim)
        return jnp.swapaxes(out, 1, 2).reshape(q.shape)
