"""Griffin, Hawk and RecurrentGemma: gated linear recurrence and local attention (Griffin, 2)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models import LanguageModel
from common.nn.attention import Attention, AttentionState
from common.nn.layout import TokenLayout
from common.nn.mlp import GatedMLP
from common.nn.norms import RMSNorm
from common.nn.param import fan_in_normal
from common.nn.recurrence import RecurrentBlock, RecurrentState

Mixer = Literal["recurrent", "attention"]
GRIFFIN_PATTERN: tuple[Mixer, ...] = ("recurrent", "recurrent", "attention")
HAWK_PATTERN: tuple[Mixer, ...] = ("recurrent",)


@dataclasses.dataclass(frozen=True)
class GriffinConfig:
    """Shape of a Griffin model.

    Attributes:
      vocab_size: V.
      width: D.
      mlp_width: F, the width of each of the MLP's two branches.
      num_heads: N query heads, and the number of blocks of the recurrence gates.
      lru_width: E.
      num_layers: number of residual blocks; `pattern` is repeated and cut off there.
      num_kv_heads: K key and value heads of the attention blocks; 1 in every released model.
      pattern: temporal mixer of each block of the repeating unit.
      attention_window: W. A query sees W earlier keys and its own, as the released weights were
        trained.
      window_counts_self: count the query's own key among the W, as the transformers library does.
      scale_embedding: multiply embeddings by sqrt(D) (RecurrentGemma does, Griffin does not).
      logits_softcap: cap of the logits, or None.
      rope_base: wavelength base of the rotary positions.
      rope_fraction: share of each head that is rotated.
      conv_taps: width of the temporal convolution.
      norm_epsilon: epsilon of every RMSNorm.
      dtype: compute dtype; parameters and recurrent state stay fp32.
      remat: what the backward pass recomputes: "none", "full" or "dots".
      reference_precision: compute the recurrence gates in `dtype` too, as the published code does.
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    lru_width: int
    num_layers: int
    num_kv_heads: int = 1
    pattern: tuple[Mixer, ...] = GRIFFIN_PATTERN
    attention_window: int = 2048
    window_counts_self: bool = False
    scale_embedding: bool = True
    logits_softcap: float | None = 30.0
    rope_base: float = 10_000.0
    rope_fraction: float = 0.5
    conv_taps: int = 4
    norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    reference_precision: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "mlp_width", "num_heads", "lru_width", "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be positive, not {getattr(self, name)}")
        if self.width % self.num_heads or self.lru_width % self.num_heads:
            raise UserError(
                f"model.width ({self.width}) and model.lru_width ({self.lru_width}) must be "
                f"multiples of model.num_heads ({self.num_heads})"
            )
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        rotated = self.head_dim * self.rope_fraction
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            raise UserError(
                f"model.rope_fraction ({self.rope_fraction}) of the head dimension "
                f"({self.head_dim}) must be an even number of dimensions"
            )
        if self.conv_taps < 2:
            raise UserError("model.conv_taps must be at least 2")
        if not self.pattern or set(self.pattern) - {"recurrent", "attention"}:
            raise UserError(f"model.pattern must name 'recurrent' or 'attention': {self.pattern}")
        if self.attention_window < 1:
            raise UserError("model.attention_window must be at least 1")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def window_keys(self) -> int:
        """Number of keys a query sees, its own included."""
        return self.attention_window + (0 if self.window_counts_self else 1)

    def mixers(self) -> tuple[Mixer, ...]:
        """The temporal mixer of every block."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def num_parameters(self) -> int:
        """Exact parameter count (embedding and head are one)."""
        d, f, e, h = self.width, self.mlp_width, self.lru_width, self.num_heads
        shared = 2 * d + 3 * d * f + 2 * f + d
        conv = (self.conv_taps + 1) * e
        recurrent = 3 * d * e + 2 * e + d + conv + e + 2 * (e * e // h + e)
        local = 2 * d * d + 2 * d * self.num_kv_heads * self.head_dim + d
        mixers = self.mixers()
        count = mixers.count("recurrent") * recurrent + mixers.count("attention") * local
        return self.vocab_size * d + d + self.num_layers * shared + count


class ResidualBlock(nnx.Module):
    """`r = x + mixer(norm(x)); r + MLP(norm(r))` (Griffin, section 2.1)."""

    def __init__(self, config: GriffinConfig, mixer: Mixer, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        narrow = fan_in_normal(2.0 / config.num_layers)
        self.temporal_pre_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.mixer: RecurrentBlock | Attention
        if mixer == "recurrent":
            self.mixer = RecurrentBlock(
                config.width,
                config.lru_width,
                config.num_heads,
                conv_taps=config.conv_taps,
                out_init=narrow,
                dtype=dtype,
                reference_precision=config.reference_precision,
                rngs=rngs,
            )
        else:
            self.mixer = Attention(
                config.width,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                window=config.window_keys,
                rope_base=config.rope_base,
                rope_fraction=config.rope_fraction,
                out_bias=True,
                out_init=narrow,
                dtype=dtype,
                rngs=rngs,
            )
        self.channel_pre_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.mlp = GatedMLP(
            config.width, config.mlp_width, use_bias=True, down_init=narrow, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: jax.Array, layout: TokenLayout, state: RecurrentState | AttentionState | None
    ) -> tuple[jax.Array, RecurrentState | AttentionState | None]:
        """`x [B, T, D]` and the mixer's state -> the same after the block."""
        mixed, state = self.mixer(self.temporal_pre_norm(x), layout, state)
        residual = x + mixed
        return residual + self.mlp(self.channel_pre_norm(residual)), state

    def init_state(self, batch: int, capacity: int | None) -> RecurrentState | AttentionState:
        """The mixer's state before the first token."""
        if isinstance(self.mixer, Attention):
            return self.mixer.init_state(batch, capacity)
        return self.mixer.init_state(batch)


class Griffin(LanguageModel):
    """RecurrentGemma's network. See `LanguageModel` for calling, prefill and decoding.

    The decode cache has a fixed size: per recurrent block `E` fp32 and `3 E` values, per attention
    block a ring of W keys and values.
    """

    def __init__(self, config: GriffinConfig, *, rngs: nnx.Rngs):
        def builder(mixer: Mixer):
            return lambda r: ResidualBlock(config, mixer, rngs=r)

        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            pattern=[builder(mixer) for mixer in config.pattern],
            num_layers=config.num_layers,
            scale_embedding=config.scale_embedding,
            logits_softcap=config.logits_softcap,
            norm_epsilon=config.norm_epsilon,
            remat_policy=config.remat,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.config = config
