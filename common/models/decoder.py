"""Decoder-only Transformer: Llama's, Gemma 2's and Gemma 3's, told apart by a configuration."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.language_model import LanguageModel
from common.nn.attention import Attention, AttentionState
from common.nn.layout import TokenLayout
from common.nn.mlp import GatedMLP, gelu_tanh
from common.nn.norms import RMSNorm
from common.nn.param import fan_in_normal
from common.nn.rope import RopeScaling

ACTIVATIONS = {"gelu_tanh": gelu_tanh, "silu": jax.nn.silu}
Reach = Literal["global", "local"]
GEMMA2_PATTERN: tuple[Reach, ...] = ("local", "global")
GEMMA3_PATTERN: tuple[Reach, ...] = (*("local",) * 5, "global")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    Attributes:
      vocab_size: V.
      width: D.
      mlp_width: F.
      num_heads: N query heads.
      num_kv_heads: K key and value heads; 1 is multi-query attention.
      head_dim: h.
      num_layers: number of blocks; `pattern` is repeated and cut off there.
      max_length: longest document; the decode cache of global blocks grows with it.
      pattern: what the attention of each block of the repeating unit reaches: the whole document
        ("global") or a window ("local").
      window: W, the number of keys that a query of a local block sees, its own included. Without
        causality a query sees W - 1 keys on each side.
      rope_base: wavelength base of the rotary positions.
      rope_scaling: how frequencies are lowered for longer texts.
      local_rope_base: base in local blocks, which then have no scaling (Gemma 3); None rotates
        them as the global ones.
      query_scale: factor of the scores; None is `h ** -0.5`.
      attention_softcap: cap of the scores, or None.
      qk_norm: RMSNorm of each head's queries and keys (Gemma 3).
      qkv_bias: biases of the query, key and value projections (Qwen 2).
      post_norms: RMSNorm of what attention and MLP add, too (Gemma 2 and 3).
      norm_epsilon: of every RMSNorm.
      zero_centred_norm: norm scales stored around 0 (Gemma) instead of 1 (Llama).
      activation: of the gate, "gelu_tanh" (Gemma) or "silu" (Llama).
      tied: one table for embedding and head.
      scale_embedding: multiply embeddings by sqrt(D) (Gemma).
      bfloat16_scale: round that factor to bfloat16 in every compute dtype (RecurrentGemma), not to
        the compute dtype.
      logits_softcap: cap of the logits, or None.
      dtype: compute dtype.
      remat: what the backward pass recomputes: "none", "full" or "dots".
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    max_length: int | None = 8192
    pattern: tuple[Reach, ...] = ("global",)
    window: int | None = None
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_base: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    post_norms: bool = False
    norm_epsilon: float = 1e-6
    zero_centred_norm: bool = True
    activation: Literal["gelu_tanh", "silu"] = "gelu_tanh"
    tied: bool = True
    scale_embedding: bool = True
    bfloat16_scale: bool = True
    logits_softcap: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "mlp_width", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim must be even, not {self.head_dim}")
        if not self.pattern or set(self.pattern) - {"global", "local"}:
            raise UserError(f"model.pattern must name 'global' or 'local': {self.pattern}")
        if "local" in self.pattern and (self.window is None or self.window < 1):
            raise UserError(f"local blocks need model.window of at least 1, not {self.window}")

    def reaches(self) -> tuple[Reach, ...]:
        """What the attention of every block reaches."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def num_parameters(self) -> int:
        """Exact parameter count; a tied table counts once."""
        d, f, h = self.width, self.mlp_width, self.head_dim
        heads, kv_heads = self.num_heads, self.num_kv_heads
        attention = 2 * d * h * (heads + kv_heads)
        attention += h * (heads + 2 * kv_heads) * self.qkv_bias + 2 * h * self.qk_norm
        norms = (4 if self.post_norms else 2) * d
        tables = (1 if self.tied else 2) * self.vocab_size * d
        return tables + d + self.num_layers * (norms + 3 * d * f + attention)


class DecoderBlock(nnx.Module):
    """`r = x + attention(norm(x)); r + MLP(norm(r))`, where a norm may follow each branch too.

    Without causality it is the block of an encoder, and has no decode cache.
    """

    def __init__(
        self,
        config: DecoderConfig,
        reach: Reach = "global",
        *,
        causal: bool = True,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(config.dtype)
        narrow = fan_in_normal(2.0 / config.num_layers)
        norm = functools.partial(
            RMSNorm,
            config.width,
            epsilon=config.norm_epsilon,
            zero_centred=config.zero_centred_norm,
            rngs=rngs,
        )
        base, scaling, window = config.rope_base, config.rope_scaling, None
        if reach == "local":
            window = config.window
            if config.local_rope_base is not None:
                base, scaling = config.local_rope_base, None
        self.attention_norm = norm()
        self.attention = Attention(
            config.width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            causal=causal,
            window=window if causal or window is None else window - 1,
            rope_base=base,
            rope_scaling=scaling,
            query_scale=config.query_scale,
            softcap=config.attention_softcap,
            qk_norm=config.qk_norm,
            norm_epsilon=config.norm_epsilon,
            zero_centred_norm=config.zero_centred_norm,
            qkv_bias=config.qkv_bias,
            out_init=narrow,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            config.width,
            config.mlp_width,
            activation=ACTIVATIONS[config.activation],
            down_init=narrow,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self, x: jax.Array, layout: TokenLayout, state: AttentionState | None
    ) -> tuple[jax.Array, AttentionState | None]:
        """`x [B, T, D]` and the cache -> the same after the block."""
        residual, state = self.attend(x, layout, state)
        return self.feed(residual), state

    def attend(
        self, x: jax.Array, layout: TokenLayout, state: AttentionState | None
    ) -> tuple[jax.Array, AttentionState | None]:
        """The first half: `x` and what attention adds to it."""
        mixed, state = self.attention(self.attention_norm(x), layout, state)
        if self.attention_post_norm is not None:
            mixed = self.attention_post_norm(mixed)
        return x + mixed, state

    def feed(self, x: jax.Array) -> jax.Array:
        """The second half: `x` and what the MLP adds to it."""
        fed = self.mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            fed = self.mlp_post_norm(fed)
        return x + fed

    def init_state(self, batch: int, capacity: int | None) -> AttentionState:
        """An empty cache for `capacity` tokens."""
        return self.attention.init_state(batch, capacity)


class Decoder(LanguageModel):
    """Decoder of any of these families; see `LanguageModel` for calling, prefill and decoding.

    The decode cache of a local block is a ring of its window; that of a global one grows with the
    longest document that the cache is made for.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def builder(reach: Reach):
            return lambda r: DecoderBlock(config, reach, rngs=r)

        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            pattern=[builder(reach) for reach in config.pattern],
            num_layers=config.num_layers,
            tied=config.tied,
            scale_embedding=config.scale_embedding,
            bfloat16_scale=config.bfloat16_scale,
            logits_softcap=config.logits_softcap,
            norm_epsilon=config.norm_epsilon,
            zero_centred_norm=config.zero_centred_norm,
            max_length=config.max_length,
            remat_policy=config.remat,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.config = config
