"""T5Gemma: a bidirectional encoder, and a decoder that attends to its states (specification, 2)."""

import dataclasses
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import DecoderBlock, DecoderConfig, Reach
from common.models.language_model import DecodeCache, LanguageModel
from common.nn.attention import AttentionState
from common.nn.cross_attention import CrossAttention, CrossKeys, CrossStates
from common.nn.layout import TokenLayout
from common.nn.norms import RMSNorm
from common.nn.param import fan_in_normal
from common.sharding import shard
from t5gemma.config import T5GemmaConfig

# Segments of padding, on either side: nobody's, so that no token sees padding of the other side.
ENCODER_PADDING, DECODER_PADDING = -(2**31), -(2**31) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossState:
    """What a decoder block carries from token to token.

    Attributes:
      own: ring of its own keys, one row a sequence.
      memory: keys of the encoder's states; where n sequences in a row share them, one row for all.
    """

    own: AttentionState
    memory: CrossKeys | None = None

    def take_rows(self, rows: jax.Array, axis: int) -> "CrossState":
        """The state of other sequences, each taken from among those that share its memory."""
        own = jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), self.own)
        return dataclasses.replace(self, own=own)


class CrossBlock(DecoderBlock):
    """A decoder's block with cross attention between its attention and its MLP."""

    def __init__(self, config: DecoderConfig, memory_width: int, reach: Reach, *, rngs: nnx.Rngs):
        super().__init__(config, reach, rngs=rngs)
        norm = {"epsilon": config.norm_epsilon, "zero_centred": config.zero_centred_norm}
        self.cross_norm = RMSNorm(config.width, **norm, rngs=rngs)
        self.cross = CrossAttention(
            config.width,
            memory_width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            query_scale=config.query_scale,
            softcap=config.attention_softcap,
            qk_norm=config.qk_norm,
            norm_epsilon=config.norm_epsilon,
            zero_centred_norm=config.zero_centred_norm,
            qkv_bias=config.qkv_bias,
            out_init=fan_in_normal(2.0 / config.num_layers),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        post = config.post_norms
        self.cross_post_norm = RMSNorm(config.width, **norm, rngs=rngs) if post else None

    def __call__(
        self,
        x: jax.Array,
        layout: TokenLayout,
        state: CrossState | None,
        memory: CrossStates | None = None,
    ) -> tuple[jax.Array, CrossState | None]:
        """`x [B, T, D]` and the cache -> the same after the block.

        Without a cache `memory` is what the cross attention reads; None leaves it out.
        """
        source: CrossStates | CrossKeys | None = memory
        if state is not None:
            source = state.memory
        x, own = self.attend(x, layout, None if state is None else state.own)
        if source is not None:
            mixed = self.cross(self.cross_norm(x), source)
            if self.cross_post_norm is not None:
                mixed = self.cross_post_norm(mixed)
            x = x + mixed
        return self.feed(x), None if state is None else CrossState(own, state.memory)

    def init_state(self, batch: int, capacity: int | None) -> CrossState:
        """An empty ring for `capacity` tokens, and nothing to attend to."""
        return CrossState(super().init_state(batch, capacity))


class Encoder(LanguageModel):
    """Blocks that see both ways. Its `run` is all that is used of a language model."""

    def __init__(self, config: DecoderConfig, *, causal: bool = False, rngs: nnx.Rngs):
        def builder(reach: Reach):
            return lambda r: DecoderBlock(config, reach, causal=causal, rngs=r)

        super().__init__(**_stack(config), pattern=[builder(r) for r in config.pattern], rngs=rngs)


class CrossDecoder(LanguageModel):
    """The side that writes: a language model whose cache knows the encoder's states (`read`)."""

    def __init__(self, config: DecoderConfig, memory_width: int, *, rngs: nnx.Rngs):
        def builder(reach: Reach):
            return lambda r: CrossBlock(config, memory_width, reach, rngs=r)

        super().__init__(**_stack(config), pattern=[builder(r) for r in config.pattern], rngs=rngs)

    def read(self, states: jax.Array, lengths: jax.Array, max_length: int | None) -> DecodeCache:
        """A cache for texts of at most `max_length` tokens about `states [B, S, De]`.

        Args:
          states: of the encoder, real ones at the head of each row.
          lengths: `[B]` int32 number of real ones.
          max_length: of the text to come.
        """
        cache = self.init_cache(states.shape[0], max_length)

        def keys_of(blocks: Any) -> tuple[CrossKeys, ...]:
            return tuple(block.cross.keys(states, lengths) for block in blocks)

        def filled(states: Any, keys: Any) -> tuple[CrossState, ...]:
            return tuple(CrossState(state.own, key) for state, key in zip(states, keys))

        units, rest = cache.units, cache.rest
        if self.units is not None:
            _, keys = jax.lax.scan(lambda _, unit: (None, keys_of(unit.blocks)), None, self.units)
            units = filled(units, keys)
        if self.rest is not None:
            rest = filled(rest, keys_of(self.rest.blocks))
        return dataclasses.replace(cache, units=units, rest=rest)


class Sides(TypedDict, total=False):
    """What else a call may be told of its tokens, `[B, S]` and `[B, T]`; None is as if not given.

    Attributes:
      encoder_positions, decoder_positions: int32; by default the real tokens of each segment,
        counted from 0.
      encoder_segments, decoder_segments: int32, equal on both sides exactly for tokens of one
        document; by default a row is one document.
      encoder_valid, decoder_valid: bool, False for padding.
    """

    encoder_positions: jax.Array | None
    encoder_segments: jax.Array | None
    encoder_valid: jax.Array | None
    decoder_positions: jax.Array | None
    decoder_segments: jax.Array | None
    decoder_valid: jax.Array | None


class T5Gemma(nnx.Module):
    """An encoder-decoder. Positions count from 0 on either side.

    Padding is what `valid` excludes: it is seen by nobody, whatever its token, position or segment.
    Where `valid` is not given, segments tell (those above 0 are real), or else the tokens: those
    that are not `config.pad_token` are real. Documents packed in a row have equal segments on both
    sides, and see nothing of each other.
    """

    def __init__(self, config: T5GemmaConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config.encoder_stack, causal=config.causal_encoder, rngs=rngs)
        self.decoder = CrossDecoder(config.decoder, config.encoder.width, rngs=rngs)
        self.config = config
        self.vocab_size = config.decoder.vocab_size
        # Set by whoever loads a model; generation falls back on them.
        self.tokenizer: Any = None
        self.stop_tokens: tuple[int, ...] = ()

    @property
    def dtype(self) -> jnp.dtype:
        """What it computes in."""
        return self.decoder.dtype

    def __call__(
        self, encoder_tokens: jax.Array, decoder_tokens: jax.Array, **sides: Unpack[Sides]
    ) -> jax.Array:
        """Logits of whole sequences.

        Args:
          encoder_tokens: `[B, S]` int32.
          decoder_tokens: `[B, T]` int32; the first one of a text is `config.bos_token`.
          **sides: see `Sides`.

        Returns:
          `[B, T, V]` fp32; those of padding mean nothing.
        """
        return self.logits(self.hidden(encoder_tokens, decoder_tokens, **sides))

    def hidden(
        self, encoder_tokens: jax.Array, decoder_tokens: jax.Array, **sides: Unpack[Sides]
    ) -> jax.Array:
        """`[B, T, Dd]`: the normalised features that the head reads; arguments as for a call."""
        unknown = sides.keys() - Sides.__annotations__.keys()
        if unknown:
            raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")
        read = self._layout(
            encoder_tokens,
            sides.get("encoder_positions"),
            sides.get("encoder_segments"),
            sides.get("encoder_valid"),
            ENCODER_PADDING,
        )
        written = self._layout(
            decoder_tokens,
            sides.get("decoder_positions"),
            sides.get("decoder_segments"),
            sides.get("decoder_valid"),
            DECODER_PADDING,
        )
        states, _ = self.encoder.run(encoder_tokens, read)
        # fp32, so that their gradient adds up over the decoder's layers without rounding.
        memory = CrossStates(states.astype(jnp.float32), read.segments, written.segments)
        x, _ = self.decoder.run(decoder_tokens, written, None, memory)
        return x

    def encode(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """`[B, S] -> [B, S, De]`: normalised states; those of padding mean nothing."""
        layout = self._layout(tokens, positions, segment_ids, valid, ENCODER_PADDING)
        return self.encoder.run(tokens, layout)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., Dd] -> [..., V]` fp32, capped where the model caps."""
        return self.decoder.logits(hidden)

    def nll(self, hidden: jax.Array, targets: jax.Array, chunk: int | None = None) -> jax.Array:
        """Losses of `hidden [B, T, Dd]` against `targets [B, T]` -> `[B, T]` fp32 nats.

        The logits of `chunk` positions of each row exist at a time (None: of all).
        """
        return self.decoder.nll(hidden, targets, chunk)

    def read(
        self,
        tokens: jax.Array,
        valid: jax.Array | None = None,
        *,
        max_length: int | None = None,
    ) -> DecodeCache:
        """Encodes `[B, S]`, computes every layer's cross keys, once, and gives an empty cache.

        `decoder.extend` goes on from there, with `config.bos_token` first.

        Args:
          tokens: `[B, S]` int32.
          valid: `[B, S]` bool, False for padding at the left or the right end of a row.
          max_length: of the text to come; None: the decoder's.
        """
        valid = tokens != self.config.pad_token if valid is None else valid
        valid = jnp.broadcast_to(valid, tokens.shape)
        # Real tokens to the head of each row: caches know padding only behind them.
        order = jnp.argsort(~valid, axis=1, stable=True)
        tokens = jnp.take_along_axis(tokens, order, axis=1)
        lengths = valid.sum(axis=1, dtype=jnp.int32)
        valid = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        return self.decoder.read(self.encode(tokens, valid=valid), lengths, max_length)

    def begin(
        self,
        tokens: jax.Array,
        valid: jax.Array | None = None,
        *,
        max_length: int | None = None,
    ) -> tuple[jax.Array, DecodeCache]:
        """`read`, and the logits `[B, V]` of each text's first token."""
        cache = self.read(tokens, valid, max_length=max_length)
        start = jnp.full((tokens.shape[0], 1), self.config.bos_token, jnp.int32)
        logits, cache = self.decoder.extend(start, cache)
        return logits[:, 0], cache

    def _layout(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        valid: jax.Array | None,
        padding: int,
    ) -> TokenLayout:
        if valid is None:
            valid = tokens != self.config.pad_token if segments is None else segments > 0
        valid = jnp.broadcast_to(valid, tokens.shape)
        segments = jnp.zeros_like(tokens) if segments is None else segments
        segments = jnp.broadcast_to(segments, tokens.shape).astype(jnp.int32)
        if positions is None:
            change = segments[:, 1:] != segments[:, :-1]
            starts = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
            count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
            before = jax.lax.cummax(jnp.where(starts, count - valid, 0), axis=1)
            positions = jnp.clip(count - 1 - before, 0)
        positions = jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32)
        segments = jnp.where(valid, segments, padding)
        positions = shard(positions, "batch", "seq")
        return TokenLayout(positions, shard(segments, "batch", "seq"), None, None, None)


def _stack(config: DecoderConfig) -> dict[str, Any]:
    """The arguments of a `LanguageModel` that a configuration decides."""
    return {
        "vocab_size": config.vocab_size,
        "width": config.width,
        "num_layers": config.num_layers,
        "tied": config.tied,
        "scale_embedding": config.scale_embedding,
        "bfloat16_scale": config.bfloat16_scale,
        "logits_softcap": config.logits_softcap,
        "norm_epsilon": config.norm_epsilon,
        "zero_centred_norm": config.zero_centred_norm,
        "max_length": config.max_length,
        "remat_policy": config.remat,
        "dtype": jnp.dtype(config.dtype),
    }
