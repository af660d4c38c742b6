"""What `python -m common.plan` compiles of T5Gemma: training step, encoding, decode step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from common.generate.ahead import language_programs, place_parameters
from common.generate.decode import begin
from common.models import Decoder
from common.models.language_model import DecodeCache
from common.sharding import BATCH_AXES, DEFAULT_RULES
from common.sharding.program import Inference, Program
from common.train.ahead import train_program
from t5gemma.config import T5GemmaConfig
from t5gemma.flops import encoder_flops, forward_flops, memory_flops, written_flops
from t5gemma.model import CrossDecoder, T5Gemma
from t5gemma.presets import PRESETS as PRESETS
from t5gemma.presets import Config, make_task


def programs(
    config: Config, devices: Sequence[jax.Device], inference: Inference
) -> Mapping[str, Callable[[], Program]]:
    """Returns the programs by name; each is made when it is asked for.

    "encode" reads a prompt of each row into a decode cache, "decode" writes one token of each row
    behind a context, about a prompt.
    """
    model = config.model
    decode = language_programs(
        lambda: CrossDecoder(model.decoder, model.encoder.width, rngs=nnx.Rngs(0)),
        devices,
        inference,
        heads=model.decoder.num_heads,
        prefill_flops=lambda rows, length: 0.0,
        decode_flops=lambda rows, context: rows * _token_flops(model, context, inference.prompt),
        empty_cache=lambda decoder: _cache(decoder, model, inference),
    )["decode"]
    return {
        "train": lambda: _train(config, devices),
        "encode": lambda: _encode(model, devices, inference),
        "decode": decode,
    }


def _train(config: Config, devices: Sequence[jax.Device]) -> Program:
    rows = config.train.batch_size
    lengths = {"encoder": config.data.encoder_length, "decoder": config.data.decoder_length}
    batch = {
        f"{side}_{name}": jax.ShapeDtypeStruct((rows, length), jnp.int32)
        for side, length in lengths.items()
        for name in ("tokens", "positions", "segments")
    }
    batch["targets"] = batch["decoder_tokens"]
    batch["weights"] = jax.ShapeDtypeStruct((rows, lengths["decoder"]), jnp.float32)
    return train_program(
        make_task(config, _teacher(config)),
        config.train,
        batch,
        devices,
        shape=f"{rows} × {lengths['encoder']} + {lengths['decoder']} tokens",
        items=rows * sum(lengths.values()),
        recomputed_flops=_recomputed_flops(config),
        seed=config.seed,
    )


def _teacher(config: Config) -> Decoder | None:
    """A teacher as large as the decoder, for plans of distillation: its shape alone."""
    if config.objective.kind != "distillation":
        return None
    settings = config.objective.teacher
    shape = dataclasses.replace(config.model.decoder, dtype=settings.dtype, remat="none")
    teacher = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0)))
    state = nnx.state(teacher)
    nnx.update(teacher, jax.tree.map(lambda x: _in(x, settings.dtype), state))
    return teacher


def _in(leaf: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _recomputed_flops(config: Config) -> float:
    """What the backward pass does again: all blocks under full remat, the head in chunks."""
    rows = config.train.batch_size
    encoded, written = config.data.encoder_length, config.data.decoder_length
    head = 2.0 * rows * written * config.model.decoder.width * config.model.decoder.vocab_size
    blocks = forward_flops(config.model, rows, encoded, written) - head
    again = blocks if config.model.decoder.remat == "full" else 0.0
    chunk = config.loss_chunk
    return again + (head if chunk is not None and chunk < written else 0.0)


def _encode(config: T5GemmaConfig, devices: Sequence[jax.Device], inference: Inference) -> Program:
    mesh = inference.mesh(devices, config.encoder.num_heads)
    model = nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0)))
    graphdef, state = place_parameters(model, model.dtype, mesh)
    rows, length = inference.rows, inference.prompt
    whole = rows % mesh.shape["data"] != 0
    placed = NamedSharding(mesh, PartitionSpec(None if whole else BATCH_AXES))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=placed)
    valid = jax.ShapeDtypeStruct((rows, length), bool, sharding=placed)
    work = encoder_flops(config, rows, length) + memory_flops(config, rows, length)
    return Program(
        function=begin,
        arguments=(graphdef, state, tokens, valid),
        keywords={"capacity": inference.context},
        holds={"parameters": state, "batch": (tokens, valid)},
        flops=work + rows * _token_flops(config, 1, length),
        items=rows * length,
        shape=f"{rows} × {length} tokens",
        mesh=mesh,
        rules=DEFAULT_RULES,
    )


def _cache(decoder: CrossDecoder, config: T5GemmaConfig, inference: Inference) -> DecodeCache:
    rows, length = inference.rows, inference.prompt
    states = jnp.zeros((rows, length, config.encoder.width), decoder.dtype)
    return decoder.read(states, jnp.full((rows,), length), inference.context)


def _token_flops(config: T5GemmaConfig, context: int, memory: int) -> float:
    """FLOPs of the last token of a context."""
    window = config.decoder.window or context
    return written_flops(config, context, min(context, window), memory)
