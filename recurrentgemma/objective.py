"""Training objective of RecurrentGemma: next token, with its weight-decay mask and FLOP count."""

from typing import Any

from flax import nnx

from common.train import Task
from common.train.language import NextToken
from recurrentgemma.model import Griffin, GriffinConfig

# Decay would pull Lambda to 0, where a = .5 and memory is gone (RecurrentGemma, section 3); the
# embedding, which is the head too, the convolution, norms and biases are left alone as well.
UNDECAYED = frozenset({"rg_lru", "conv", "embed", "scale", "bias", "up_bias"})


class GriffinTask(NextToken):
    """Trains a `Griffin` of the given shape.

    Args:
      config: shape of the model.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
    """

    def __init__(self, config: GriffinConfig, *, loss_chunk: int | None = None):
        super().__init__(
            lambda rngs: Griffin(config, rngs=rngs),
            loss_chunk=loss_chunk,
            forward_flops=lambda batch, length: forward_flops(config, batch, length),
        )

    def decays(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        return not UNDECAYED.intersection(path) and Task.decays(self, path, variable)


def forward_flops(config: GriffinConfig, batch: int, length: int) -> float:
    """FLOPs of one forward pass over `[batch, length]` tokens, two for each multiply-add.

    Matrix products exactly, head included, embedding look-up not; attention over the keys each
    query really sees. The recurrence and other elementwise work (under 1 % of 2B) are left out.
    """
    window = min(config.window_keys, length)
    # The first W queries see 1, 2, ... W keys, the others W.
    keys = (window * (window + 1) / 2 + (length - window) * window) / length
    return batch * length * token_flops(config, keys)


def token_flops(config: GriffinConfig, keys: float) -> float:
    """FLOPs of one token's forward pass, head included, whose queries see so many keys."""
    d, f, e = config.width, config.mlp_width, config.lru_width
    mixer = {
        "recurrent": 3 * d * e + 2 * e * e / config.num_heads,
        "attention": 2 * d * d + 2 * d * config.num_kv_heads * config.head_dim + 2 * d * keys,
    }
    products = sum(3 * d * f + mixer[kind] for kind in config.mixers()) + d * config.vocab_size
    return 2.0 * products
