"""What `python -m common.plan` compiles of RecurrentGemma: training step, prefill, decode step."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from common.generate.ahead import language_programs
from common.sharding.program import Inference, Program
from common.train.ahead import train_program
from recurrentgemma.config import PRESETS as PRESETS
from recurrentgemma.config import Config
from recurrentgemma.model import Griffin, GriffinConfig
from recurrentgemma.objective import GriffinTask, forward_flops, token_flops


def programs(
    config: Config, devices: Sequence[jax.Device], inference: Inference
) -> Mapping[str, Callable[[], Program]]:
    """Returns the programs by name; each is made when it is asked for."""
    model = config.model
    return {
        "train": lambda: _train(config, devices),
        **language_programs(
            lambda: Griffin(model, rngs=nnx.Rngs(0)),
            devices,
            inference,
            heads=model.num_heads,
            prefill_flops=lambda rows, length: _prefill_flops(model, rows, length),
            decode_flops=lambda rows, context: (
                rows * token_flops(model, min(model.window_keys, context))
            ),
        ),
    }


def _train(config: Config, devices: Sequence[jax.Device]) -> Program:
    rows, length = config.train.batch_size, config.data.sequence_length
    integers = ("tokens", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in integers}
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    return train_program(
        GriffinTask(config.model, loss_chunk=config.loss_chunk),
        config.train,
        batch,
        devices,
        shape=f"{rows} × {length} tokens",
        items=rows * length,
        recomputed_flops=_recomputed_flops(config),
        seed=config.seed,
    )


def _recomputed_flops(config: Config) -> float:
    """What the backward pass does again: all blocks under full remat, the head in chunks."""
    rows, length = config.train.batch_size, config.data.sequence_length
    head = _head_flops(config.model, rows * length)
    chunk = config.loss_chunk
    chunked = chunk is not None and chunk < length and length % chunk == 0
    blocks = forward_flops(config.model, rows, length) - head
    return (blocks if config.model.remat == "full" else 0.0) + (head if chunked else 0.0)


def _prefill_flops(config: GriffinConfig, rows: int, length: int) -> float:
    """A forward pass whose head reads the last token of each row alone."""
    return forward_flops(config, rows, length) - _head_flops(config, rows * (length - 1))


def _head_flops(config: GriffinConfig, tokens: int) -> float:
    return 2.0 * tokens * config.width * config.vocab_size
