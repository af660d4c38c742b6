"""FLOPs of an encoder-decoder, counted by hand as `common.models.flops` counts a decoder's."""

from common.models.flops import decoder_flops, head_flops, seen_keys, token_flops
from t5gemma.config import T5GemmaConfig


def encoder_flops(config: T5GemmaConfig, batch: int, length: int) -> float:
    """FLOPs of encoding `[batch, length]` tokens."""
    stack, causal = config.encoder_stack, config.causal_encoder
    return decoder_flops(stack, batch, length, head=False, causal=causal)


def memory_flops(config: T5GemmaConfig, batch: int, length: int) -> float:
    """FLOPs of every decoder layer's cross keys and values for `[batch, length]` encoder states."""
    decoder = config.decoder
    per_state = 2 * config.encoder.width * decoder.num_kv_heads * decoder.head_dim
    return 2.0 * batch * length * decoder.num_layers * per_state


def written_flops(config: T5GemmaConfig, keys: float, window_keys: float, memory: float) -> float:
    """FLOPs of one decoder token, head included.

    Args:
      config: the model.
      keys, window_keys: of its own side that it sees in global and in local blocks.
      memory: encoder states that it sees.
    """
    decoder = config.decoder
    inner = decoder.num_heads * decoder.head_dim
    cross = decoder.num_layers * 2 * inner * (decoder.width + memory)
    return token_flops(decoder, keys, window_keys) + 2.0 * cross + head_flops(decoder)


def forward_flops(config: T5GemmaConfig, batch: int, encoded: int, written: int) -> float:
    """FLOPs of one forward pass over `[batch, encoded]` and `[batch, written]` tokens."""
    seen = [seen_keys(config.decoder, reach, written) for reach in ("global", "local")]
    return (
        encoder_flops(config, batch, encoded)
        + memory_flops(config, batch, encoded)
        + batch * written * written_flops(config, seen[0], seen[1], encoded)
    )
