"""FLOPs by hand against those of the compiled encoder-decoder, which XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from common.models.decoder import DecoderConfig
from t5gemma import T5Gemma, T5GemmaConfig
from t5gemma.config import public
from t5gemma.flops import forward_flops

# Wide, so that products are all that counts; one layer, for XLA counts the body of a scan once.
ENCODER = DecoderConfig(
    vocab_size=600,
    width=160,
    mlp_width=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_layers=1,
    post_norms=True,
)
DECODER = dataclasses.replace(ENCODER, width=128, mlp_width=512)


def test_a_forward_pass_as_the_compiler_counts_it():
    config = T5GemmaConfig(ENCODER, DECODER)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0))))
    read, written = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (64, 32))

    def run(state, read, written):
        return nnx.merge(graphdef, state)(read, written)

    counted = jax.jit(run).lower(state, read, written).compile().cost_analysis()["flops"]
    assert forward_flops(config, 2, 64, 32) == pytest.approx(counted, rel=0.06)


def test_2b_2b_costs_two_flops_for_each_parameter_and_token():
    """Half of the parameters work for each side's tokens, but cross keys for the encoder's."""
    config = public("2b-2b")
    table = config.decoder.vocab_size * config.decoder.width
    each = config.num_parameters() - 2 * table
    length = 512
    work = forward_flops(config, 1, length, length)
    assert work == pytest.approx(2 * length * (each + table), rel=0.05)
