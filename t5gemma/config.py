"""Shapes of T5Gemma: two stacks of a decoder family's blocks, and every public pair of them."""

import dataclasses
import functools
from typing import Any, Literal

from common.errors import UserError
from common.models.decoder import GEMMA2_PATTERN, DecoderConfig

EncoderWindow = Literal["published", "transformers"]


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """Shape of an encoder-decoder.

    Both sides are described as decoders are, so that each can come from one. The encoder sees both
    ways and has no head: of its `tied` and `logits_softcap` nothing is used.

    Attributes:
      encoder: the stack that reads the input; its width is De.
      decoder: the stack that writes; its blocks attend to the encoder's last states with as many
        heads as to their own. `tied`: its table is the head too.
      encoder_window: keys that a local encoder block sees: "published" W - 1 on each side, as the
        weights were trained; "transformers" W on each side, as that library has it since 5.0.
      causal_encoder: a query of the encoder sees no later key (an ablation of the paper, 3.6).
      bos_token: what the decoder starts with.
      pad_token: token that counts as padding where nothing is said about validity; -1: none.
    """

    encoder: DecoderConfig
    decoder: DecoderConfig
    encoder_window: EncoderWindow = "published"
    causal_encoder: bool = False
    bos_token: int = 2
    pad_token: int = 0

    def __post_init__(self) -> None:
        if self.encoder.dtype != self.decoder.dtype:
            raise UserError(
                f"model.encoder.dtype ({self.encoder.dtype}) and model.decoder.dtype "
                f"({self.decoder.dtype}) must be the same"
            )
        if self.encoder_window not in ("published", "transformers"):
            raise UserError(
                "model.encoder_window must be 'published' or 'transformers', not "
                f"{self.encoder_window!r}"
            )
        most = self.decoder.vocab_size - 1
        if not 0 <= self.bos_token <= most:
            raise UserError(
                f"model.bos_token must be a token of the decoder's, 0...{most}, not "
                f"{self.bos_token}"
            )
        if self.pad_token == self.bos_token or not -1 <= self.pad_token <= most:
            raise UserError(
                f"model.pad_token must be a token other than model.bos_token ({self.bos_token}), "
                f"or -1 for none, not {self.pad_token}"
            )

    def with_stacks(self, **changes: object) -> "T5GemmaConfig":
        """This shape with fields of both stacks replaced (`dtype`, `remat`, `window` …)."""
        return dataclasses.replace(
            self,
            encoder=dataclasses.replace(self.encoder, **changes),  # type: ignore[arg-type]
            decoder=dataclasses.replace(self.decoder, **changes),  # type: ignore[arg-type]
        )

    @property
    def encoder_stack(self) -> DecoderConfig:
        """The encoder as it is built: one head-less table, its window as `encoder_window` says."""
        window = self.encoder.window
        if window is not None and self.encoder_window == "transformers" and not self.causal_encoder:
            window += 1
        return dataclasses.replace(self.encoder, tied=True, window=window)

    def num_cross_parameters(self) -> int:
        """Parameters of the cross attention, norms included."""
        d, h = self.decoder.width, self.decoder.head_dim
        heads, kv_heads = self.decoder.num_heads, self.decoder.num_kv_heads
        layer = 2 * d * heads * h + 2 * self.encoder.width * kv_heads * h
        layer += h * (heads + 2 * kv_heads) * self.decoder.qkv_bias + 2 * h * self.decoder.qk_norm
        layer += (2 if self.decoder.post_norms else 1) * d
        return self.decoder.num_layers * layer

    def num_parameters(self) -> int:
        """Exact parameter count; a tied table counts once."""
        stacks = self.encoder_stack.num_parameters() + self.decoder.num_parameters()
        return stacks + self.num_cross_parameters()


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Row of the specification's table 2.1."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int


_STACKS = {
    "s": _Stack(8, 512, 1024, 8, 8, 64),
    "b": _Stack(12, 768, 2048, 12, 12, 64),
    "l": _Stack(24, 1024, 2816, 16, 16, 64),
    "ml": _Stack(26, 1152, 6912, 4, 4, 256),
    "xl": _Stack(24, 2048, 5120, 32, 32, 64),
    "2b": _Stack(26, 2304, 9216, 8, 4, 256),
    "9b": _Stack(42, 3584, 14336, 16, 8, 256),
}
_PAIRS = ("s-s", "b-b", "l-l", "ml-ml", "xl-xl", "2b-2b", "9b-2b", "9b-9b")


def gemma2_stack(**shape: Any) -> DecoderConfig:
    """A stack of `shape` with all that the stacks of every size have in common."""
    return DecoderConfig(
        pattern=GEMMA2_PATTERN,
        attention_softcap=50.0,
        post_norms=True,
        bfloat16_scale=False,
        logits_softcap=30.0,
        **shape,
    )


def gemma_stack(size: str) -> DecoderConfig:
    """The stack of a public size: "s", "b", "l", "ml", "xl", "2b" or "9b"."""
    row = _STACKS[size]
    return gemma2_stack(
        vocab_size=256_000,
        width=row.width,
        mlp_width=row.mlp_width,
        num_heads=row.heads,
        num_kv_heads=row.kv_heads,
        head_dim=row.head_dim,
        num_layers=row.layers,
        max_length=8192,
        window=4096,
        dtype="bfloat16",
        remat="full",
    )


def public(pair: str) -> T5GemmaConfig:
    """A released pair, "2b-2b" or "9b-2b" say: the encoder's size first."""
    encoder, decoder = pair.split("-")
    return T5GemmaConfig(gemma_stack(encoder), gemma_stack(decoder))


def smoke_model() -> T5GemmaConfig:
    """A pair of a few ten thousand parameters, its decoder narrower than its encoder."""
    encoder = gemma2_stack(
        vocab_size=512,
        width=32,
        mlp_width=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_layers=2,
        max_length=512,
        window=16,
    )
    return T5GemmaConfig(encoder, dataclasses.replace(encoder, width=24, mlp_width=64, head_dim=8))


# Every shape by name; those of the releases compute in bfloat16 and recompute in the backward pass.
MODELS = {
    "smoke": smoke_model,
    **{pair: functools.partial(public, pair) for pair in _PAIRS},
}
