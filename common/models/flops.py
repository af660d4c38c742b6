"""FLOPs of a decoder's blocks, counted by hand: two for each multiply-add of a matrix product.

Attention counts the keys that are seen. Embedding look-ups, norms and other elementwise work, a
percent of a large model, are left out.
"""

from common.models.decoder import DecoderConfig, Reach


def token_flops(config: DecoderConfig, keys: float, window_keys: float | None = None) -> float:
    """FLOPs of one token's way through all blocks, the head not included.

    Args:
      config: the stack.
      keys: how many its query sees in a global block.
      window_keys: and in a local one; as many if None.
    """
    products = 2 * config.width * config.head_dim * (config.num_heads + config.num_kv_heads)
    products += 3 * config.width * config.mlp_width
    seen = {"global": keys, "local": keys if window_keys is None else window_keys}
    pairs = sum(seen[reach] for reach in config.reaches())
    return 2.0 * (config.num_layers * products + 2 * config.num_heads * config.head_dim * pairs)


def head_flops(config: DecoderConfig) -> float:
    """FLOPs of one token's logits."""
    return 2.0 * config.width * config.vocab_size


def decoder_flops(
    config: DecoderConfig, batch: int, length: int, *, head: bool = True, causal: bool = True
) -> float:
    """FLOPs of one forward pass over `[batch, length]` tokens.

    Args:
      config: the stack.
      batch, length: of the rows, each one document.
      head: count the logits too.
      causal: a query sees the keys up to its own; otherwise all, or its window on both sides.
    """
    keys = {reach: seen_keys(config, reach, length, causal=causal) for reach in config.pattern}
    every = keys.get("global", 0.0)
    each = token_flops(config, every, keys.get("local", every))
    return batch * length * (each + (head_flops(config) if head else 0.0))


def seen_keys(config: DecoderConfig, reach: Reach, length: int, *, causal: bool = True) -> float:
    """Keys that a query of a document of `length` tokens sees on average."""
    window = length
    if reach == "local" and config.window is not None:
        window = min(config.window, length)
    # On one side, its own included: the first W see 1, 2, ... W, the others W.
    behind = (window * (window + 1) / 2 + (length - window) * window) / length
    return behind if causal else 2 * behind - 1
