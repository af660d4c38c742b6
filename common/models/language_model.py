"""The language model every package shares: a scanned pattern of blocks, and cached decoding.

A model is a repeating unit of residual blocks ("recurrent, recurrent, attention", or one attention
block). The unit is stacked and scanned; what does not fill a whole unit follows unrolled. A family
such as Griffin or Gemma differs only in the blocks it builds.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.embed import Embedding
from common.nn.layout import TokenLayout, chunk_layout, end_of_chunk, sequence_layout
from common.nn.norms import RMSNorm
from common.nn.stack import remat, scan_layers, stack
from common.nn.table import Head, tied_nll
from common.sharding import shard


class Block(Protocol):
    """A residual block: mixes over time, then over channels."""

    def __call__(self, x: jax.Array, layout: TokenLayout, state: Any) -> tuple[jax.Array, Any]: ...

    def init_state(self, batch: int, capacity: int | None) -> Any: ...


BuildBlock = Callable[[nnx.Rngs], nnx.Module]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """Everything decoding carries, as a pytree that can be saved, copied and forked.

    Attributes:
      cached: `[B]` int32 position of each row's next token.
      first: `[B]` int32 first position seen of the current document.
      units: states of the stacked unit's blocks, leaves `[units, B, ...]`; None without units.
      rest: states of the blocks behind the stack, leaves `[B, ...]`.
    """

    cached: jax.Array
    first: jax.Array
    units: Any
    rest: Any

    def unrolled(self) -> "DecodeCache":
        """The cache for an `unrolled` model: every block's state an array of its own."""
        if self.units is None:
            return self
        depth = jax.tree.leaves(self.units)[0].shape[0]
        units = [jax.tree.map(lambda leaf, n=n: leaf[n], self.units) for n in range(depth)]
        return dataclasses.replace(
            self, units=None, rest=(*itertools.chain(*units), *(self.rest or ()))
        )

    def take_rows(self, rows: jax.Array) -> "DecodeCache":
        """The cache whose row r is this one's row `rows[r]`.

        A state with a `take_rows(rows, axis)` of its own says itself what that means for it.
        """

        def own(state: Any) -> bool:
            return hasattr(state, "take_rows")

        def taken(axis: int, states: Any) -> Any:
            return jax.tree.map(
                lambda x: x.take_rows(rows, axis) if own(x) else jnp.take(x, rows, axis=axis),
                states,
                is_leaf=own,
            )

        return DecodeCache(
            cached=jnp.take(self.cached, rows),
            first=jnp.take(self.first, rows),
            units=taken(1, self.units),
            rest=taken(0, self.rest),
        )

    def stacked_as(self, like: "DecodeCache") -> "DecodeCache":
        """Undoes `unrolled`: the same states in the arrangement of `like`."""
        if like.units is None:
            return self
        size, depth = len(like.units), jax.tree.leaves(like.units)[0].shape[0]
        units = [self.rest[n * size : (n + 1) * size] for n in range(depth)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *units)
        rest = self.rest[depth * size :] if like.rest is not None else None
        return dataclasses.replace(self, units=stacked, rest=rest)


@runtime_checkable
class CausalLM(Protocol):
    """What generation, editing, steering and speculative decoding need of a language model."""

    vocab_size: int
    max_length: int | None
    tokenizer: Any
    stop_tokens: tuple[int, ...]

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array: ...

    def init_cache(self, batch_size: int, max_length: int | None = None) -> DecodeCache: ...

    def unrolled(self) -> "CausalLM": ...

    def extend(
        self,
        tokens: jax.Array,
        cache: DecodeCache,
        positions: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, DecodeCache]: ...


class Unit(nnx.Module):
    """The blocks of one repetition of the pattern."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(
        self, x: jax.Array, layout: TokenLayout, states: Sequence[Any], *context: Any
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        new_states = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, layout, state, *context)
            x = shard(x, "batch", "seq", None)
            new_states.append(state)
        return x, tuple(new_states)

    def init_states(self, batch: int, capacity: int | None) -> tuple[Any, ...]:
        return tuple(block.init_state(batch, capacity) for block in self.blocks)


class LanguageModel(nnx.Module):
    """Causal language model over a repeating pattern of blocks.

    Args:
      vocab_size: V.
      width: D.
      pattern: builders of the repeating unit's blocks.
      num_layers: total number of blocks; the pattern is repeated and cut off there.
      tied: one table for embedding and head.
      scale_embedding: multiply embeddings by sqrt(D).
      bfloat16_scale: round that factor to bfloat16 (RecurrentGemma); else to the compute dtype.
      logits_softcap: cap c of `c tanh(logits / c)`, or None.
      norm_epsilon: epsilon of the final norm.
      max_length: longest document the model may see, or None if there is no limit.
      remat_policy: what the backward pass recomputes ("none", "full", "dots").
      dtype: compute dtype.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        pattern: Sequence[BuildBlock],
        num_layers: int,
        tied: bool = True,
        scale_embedding: bool,
        bfloat16_scale: bool = True,
        logits_softcap: float | None,
        norm_epsilon: float = 1e-6,
        zero_centred_norm: bool = True,
        max_length: int | None = None,
        remat_policy: str = "none",
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embed = Embedding(
            vocab_size,
            width,
            scale_by_sqrt_width=scale_embedding,
            scale_dtype=jnp.bfloat16 if bfloat16_scale else dtype,
            dtype=dtype,
            rngs=rngs,
        )
        depth, remainder = divmod(num_layers, len(pattern))
        self.units = stack(functools.partial(_build_unit, pattern), depth, rngs) if depth else None
        self.rest = _build_unit(pattern[:remainder], rngs) if remainder else None
        self.final_norm = RMSNorm(
            width, epsilon=norm_epsilon, zero_centred=zero_centred_norm, rngs=rngs
        )
        self.head = None if tied else Embedding(vocab_size, width, dtype=dtype, rngs=rngs)
        self.logits_softcap = logits_softcap
        self.vocab_size, self.width = vocab_size, width
        self.num_layers, self.num_units, self.unit_size = num_layers, depth, len(pattern)
        self.max_length = max_length
        # Set by whoever loads a model; generation falls back on them.
        self.tokenizer: Any = None
        self.stop_tokens: tuple[int, ...] = ()
        self.remat_policy = remat_policy
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of whole sequences.

        Args:
          tokens: `[B, L]` int32.
          positions: `[B, L]` int32 position inside each document; a 0 starts a document. Left
            padding has position -1.
          segment_ids: `[B, L]` int32, different for the documents packed in a row.

        Returns:
          `[B, L, V]` fp32.
        """
        return self.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """`[B, L] -> [B, L, D]`: the normalised features that the head reads."""
        x, _ = self.run(tokens, sequence_layout(tokens, positions, segment_ids))
        return x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., D] -> [..., V]` fp32, capped where the model caps."""
        return self._capped(self._head.decode(hidden))

    def nll(self, hidden: jax.Array, targets: jax.Array, chunk: int | None = None) -> jax.Array:
        """Next-token losses: `hidden [B, L, D]`, `targets [B, L]` -> `[B, L]` fp32 nats.

        The logits of `chunk` positions of each row exist at a time (None: of all).
        """
        head = self.output
        return tied_nll(hidden, head.table, targets, cap=head.cap, dtype=head.dtype, chunk=chunk)

    @property
    def output(self) -> Head:
        """What `logits` are made by, for losses of more than the next token (`through_head`)."""
        return Head(self._head.table[...], self._capped, self.dtype)

    @property
    def _head(self) -> Embedding:
        return self.embed if self.head is None else self.head

    def _capped(self, logits: jax.Array) -> jax.Array:
        if self.logits_softcap is None:
            return logits
        return self.logits_softcap * jnp.tanh(logits / self.logits_softcap)

    def init_cache(self, batch_size: int, max_length: int | None = None) -> DecodeCache:
        """An empty cache for `batch_size` documents of at most `max_length` tokens (None: any)."""
        capacity = max_length if max_length is not None else self.max_length
        units = None
        if self.units is not None:
            one = self.units.init_states(batch_size, capacity)
            units = jax.tree.map(
                lambda leaf: jnp.zeros((self.num_units, *leaf.shape), leaf.dtype), one
            )
        rest = None if self.rest is None else self.rest.init_states(batch_size, capacity)
        count = jnp.zeros((batch_size,), jnp.int32)
        return DecodeCache(count, count, units, rest)

    def unrolled(self) -> "LanguageModel":
        """The same model without a stack: every block has arrays of its own. For decode loops.

        A scan slices each layer's weights and states out of their stack, and copies them to do so.
        Beside a chunk of tokens that is nothing; for one token it is several times the work itself.
        Unrolled outside of the loop, it is done once. Takes caches that are `unrolled` too.
        """
        model = nnx.merge(*nnx.split(self))
        if model.units is None:
            return model
        graphdef, state = nnx.split(model.units)
        units = [
            nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], state))
            for n in range(model.num_units)
        ]
        blocks = [block for unit in units for block in unit.blocks]
        if model.rest is not None:
            blocks += model.rest.blocks
        model.units, model.num_units, model.rest = None, 0, nnx.data(Unit(blocks))
        return model

    def prefill(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        valid: jax.Array | None = None,
        *,
        max_length: int | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, DecodeCache]:
        """`extend` from an empty cache."""
        cache = self.init_cache(tokens.shape[0], max_length)
        return self._extend(tokens, cache, positions, valid, last_only=last_only, fresh=True)

    def extend(
        self,
        tokens: jax.Array,
        cache: DecodeCache,
        positions: jax.Array | None = None,
        valid: jax.Array | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[jax.Array, DecodeCache]:
        """Reads on: a prefill chunk of any size, or one token.

        Args:
          tokens: `[B, T]` int32.
          cache: what came before.
          positions: `[B, T]`; None counts on from the cache. A 0 starts a new document.
          valid: `[B, T]` bool, False for padding at the left or the right end of a row; padding
            leaves the row's state as it was.
          last_only: return the logits of each row's last real token alone, `[B, V]`.

        Returns:
          Logits `[B, T, V]` fp32 (those of padding mean nothing) and the new cache.
        """
        return self._extend(tokens, cache, positions, valid, last_only=last_only, fresh=False)

    def _extend(self, tokens, cache, positions, valid, *, last_only: bool, fresh: bool):
        lengths = shift = None
        if valid is not None:
            # Left padding becomes right padding, so that a layer meets one kind only.
            valid = jnp.broadcast_to(valid, tokens.shape)
            lengths = valid.sum(axis=1, dtype=jnp.int32)
            shift = jnp.argmax(valid, axis=1)
            tokens = _rotate(tokens, shift)
            if positions is not None:
                positions = _rotate(jnp.broadcast_to(positions, tokens.shape), shift)
        layout = chunk_layout(tokens, cache.cached, cache.first, positions, lengths, fresh=fresh)
        x, (units, rest) = self.run(tokens, layout, cache)
        cached, first = end_of_chunk(layout)
        new_cache = DecodeCache(cached, first, units, rest)
        if last_only:
            last = jnp.full_like(cached, tokens.shape[1] - 1) if lengths is None else lengths - 1
            x = jnp.take_along_axis(x, jnp.clip(last, 0)[:, None, None], axis=1)[:, 0]
            return self.logits(x), new_cache
        if shift is not None:
            x = _rotate(x, -shift)
        return self.logits(x), new_cache

    def run(
        self,
        tokens: jax.Array,
        layout: TokenLayout,
        cache: DecodeCache | None = None,
        *context: Any,
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        """Embeds, applies every block and the final norm; also the blocks' new states.

        Every block is given `context` besides, the same for all.
        """
        x = shard(self.embed.encode(tokens), "batch", "seq", None)
        units = rest = None
        if self.units is not None:
            none = (None,) * self.unit_size

            def body(x, unit_and_states):
                unit, states = unit_and_states
                return unit(x, layout, states, *context)

            states = none if cache is None else cache.units
            layers = (self.units, states)
            x, units = scan_layers(body, x, layers, self.remat_policy, blocks=self.unit_size)
        if self.rest is not None:
            states = (None,) * len(self.rest.blocks) if cache is None else cache.rest
            tail = remat(lambda x, rest: rest(x, layout, states, *context), self.remat_policy)
            x, rest = tail(x, self.rest)
        return self.final_norm(x), (units, rest)


def _build_unit(pattern: Sequence[BuildBlock], rngs: nnx.Rngs) -> Unit:
    return Unit([build(rngs) for build in pattern])


def _rotate(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Rotates each row of `[B, T, ...]` to the left by `shift [B]`."""
    length = x.shape[1]
    index = (jnp.arange(length)[None] + shift[:, None]) % length
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
