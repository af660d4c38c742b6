"""Decoder-only Transformer: rotary positions, grouped keys, gated MLP (as Gemma and Llama)."""

import dataclasses
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

ACTIVATIONS = {"gelu_tanh": gelu_tanh, "silu": jax.nn.silu}


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
      num_layers: number of blocks.
      max_length: longest document; the decode cache grows with it.
      rope_base: wavelength base of the rotary positions.
      activation: of the gate, "gelu_tanh" (Gemma) or "silu" (Llama).
      scale_embedding: multiply embeddings by sqrt(D) (Gemma).
      zero_centred_norm: norm scales stored around 0 (Gemma) instead of 1 (Llama).
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
    rope_base: float = 10_000.0
    activation: Literal["gelu_tanh", "silu"] = "gelu_tanh"
    scale_embedding: bool = True
    zero_centred_norm: bool = True
    logits_softcap: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )

    def num_parameters(self) -> int:
        """Exact parameter count (embedding and head are one)."""
        d, f = self.width, self.mlp_width
        attention = (
            2 * d * self.num_heads * self.head_dim + 2 * d * self.num_kv_heads * self.head_dim
        )
        return self.vocab_size * d + d + self.num_layers * (2 * d + 3 * d * f + attention)


class DecoderBlock(nnx.Module):
    """`r = x + attention(norm(x)); r + MLP(norm(r))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        narrow = fan_in_normal(2.0 / config.num_layers)
        norm = {"zero_centred": config.zero_centred_norm, "rngs": rngs}
        self.attention_norm = RMSNorm(config.width, **norm)
        self.attention = Attention(
            config.width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_base=config.rope_base,
            out_init=narrow,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.width, **norm)
        self.mlp = GatedMLP(
            config.width,
            config.mlp_width,
            activation=ACTIVATIONS[config.activation],
            down_init=narrow,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, layout: TokenLayout, state: AttentionState | None
    ) -> tuple[jax.Array, AttentionState | None]:
        """`x [B, T, D]` and the cache -> the same after the block."""
        mixed, state = self.attention(self.attention_norm(x), layout, state)
        residual = x + mixed
        return residual + self.mlp(self.mlp_norm(residual)), state

    def init_state(self, batch: int, capacity: int | None) -> AttentionState:
        """An empty cache for `capacity` tokens."""
        return self.attention.init_state(batch, capacity)


class Decoder(LanguageModel):
    """Full-attention decoder; its decode cache grows with the longest document it is made for."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            pattern=[lambda r: DecoderBlock(config, rngs=r)],
            num_layers=config.num_layers,
            scale_embedding=config.scale_embedding,
            logits_softcap=config.logits_softcap,
            zero_centred_norm=config.zero_centred_norm,
            max_length=config.max_length,
            remat_policy=config.remat,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.config = config
